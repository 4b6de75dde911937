# What the master does about slaves that fail: between _jobs.pxi, which sends, and _master.pxi, which runs the loop.

cdef enum:
    PROGRESS_NS = 100_000_000   # between two looks at the counters


cdef class Survivor(Postmaster):
    """Carries out what the watch (survival.py) decides, and keeps what is known of jobs whose slaves failed."""
    cdef object watch                   # survival.Watch, or None: nobody is watched
    cdef object acknowledge             # asks MPI which ranks it knows to have failed
    cdef readonly set dead              # ranks whose process is gone: the channel's set, for the runs to come
    cdef readonly set missing           # ranks that did not leave the run: likewise, but they may come back
    cdef dict fellows                   # of slaves that are groups: rank → the ranks of its group, the leader first
    cdef set doubtful                   # ranks of a group of which one is suspected, or in an error: they may not come out of it
    cdef object again                   # (index, job, strikes, history) of jobs that go out one by one
    cdef int again_count
    cdef bint mpi_failed                # an MPI call told of a rank that failed
    cdef list broken_off                # (rank, why): what was on its way between us will never be complete
    cdef readonly bint failed           # ranks failed: nobody may finalize MPI at the end of the program
    cdef int *said_bye                  # likewise: it has left the run
    cdef int64_t grace_ns               # how long those that may come back are waited for at the end
    cdef int64_t stragglers_since_ns
    cdef int64_t failed_ns              # when a slave failed last
    cdef public object progress         # progress.Progress, or None
    cdef int64_t progress_ns            # when it is given the counters next
    cdef int64_t failed_count           # jobs that went to process_failure
    cdef int64_t stop_by_ns             # at the end of a run that was drained nobody is waited for any longer; 0: no limit

    def __dealloc__(self):
        free(self.said_bye)

    @property
    def watched(self):
        """Whether there is a watch."""
        return self.watch is not None

    def watch_over(self, watch, acknowledge, double grace_s):
        """Have a watch, and what asks MPI for failed ranks. At the end those that may come back get so long. After `begin`."""
        self.watch, self.acknowledge = watch, acknowledge
        self.grace_ns = <int64_t> (grace_s * 1e9)

    def note(self, str event, **facts):
        """Tell the history of something rare."""
        if self.keeps_history:
            self.history.event(event, **facts)

    cdef int on_tick(self, int64_t now) except -1:
        if self.watch is None:
            return 0
        try:
            if self.keeps_history:
                self.lines.flush_in_time()
                self.history.look_for_trouble()
            if self.mpi_failed:
                self.mpi_failed = False
                for rank in self.acknowledge():
                    self.lose(rank, "MPI reports that the process failed")
                self.renew_receives()
            while self.broken_off:
                rank, why = self.broken_off.pop()
                self.lose(rank, f"a message broke off: MPI reports {why}")
            for slave, what, how in self.watch.tick(now * 1e-9):
                if what == "gone":
                    self.lose(slave, how)
                elif what == "lost":
                    self.miss(slave, how)
                elif what == "suspect":
                    self.suspect(slave, how)
                elif self.scheduler.on_ready(slave) == 0:
                    self.note("back", slave=slave, how=how)
                    logger.warning("slave %d is taken on again: %s", slave, how)
            self.look_for_keepers(self.dead, self.missing)
            if self.progress is not None and now >= self.progress_ns:
                self.progress_ns = now + PROGRESS_NS
                self.progress.tick(now * 1e-9, self.counts)
            if self.stopping:
                self.look_for_stragglers(now)
            else:
                self.look_at_the_clock(now)
        except BaseException as error:
            self.fail(error)
        return 0

    def counts(self):
        """How many jobs have ended, have failed; how many slaves are busy, and are up."""
        return self.done_count(), self.failed_count, self.busy_slaves(), self.scheduler.up_count

    def busy_slaves(self):
        """How many slaves hold jobs."""
        return sum(self.scheduler.held(slave) > 0 for slave in range(1, self.scheduler.slave_count + 1))

    cdef int64_t done_count(self) except -1:
        """Jobs that were given out and have come to their end."""
        return 0

    cdef int renew_receives(self) except -1:
        """Post all receives anew: an Open MPI request that met a failure may say so for ever, acknowledged or not."""
        cdef int i, k, flag, cancelled
        for k in range(self.order_length):
            i = self.order[(self.order_head + k) % self.posted]
            flag = cancelled = 0
            MPI_Cancel(&self.receives[i])  # an error of these calls is the one that is being dealt with
            MPI_Test(&self.receives[i], &flag, &self.status)
            if not flag:
                continue
            check(MPI_Test_cancelled(&self.status, &cancelled))
            if not cancelled and self.is_ours(i):
                self.came_in(i, self.status.MPI_SOURCE)
            check(MPI_Irecv(self.message_data[i], MESSAGE_BYTES, MPI_BYTE, self.source, TAG_MESSAGE, self.comm,
                            &self.receives[i]))
        return 0

    cdef int came_in(self, int i, int source) except -1:
        """A message that the master has yet to deal with."""
        return 0

    cdef int look_at_the_clock(self, int64_t now) except -1:
        """Whether it is time to drain."""
        return 0

    cdef int on_mpi_error(self, int code, int other) except -1:
        """An error that tells of a failed rank is the watch's business. One of a message to or from a slave costs that slave: MPICH
        knows no other way to say that it died while its memory was being read."""
        cdef int kind = 0
        check(MPI_Error_class(code, &kind))
        if self.watch is None or (kind not in FAILED_CLASSES and other < 1):
            raise_mpi_error(code)
        if kind in FAILED_CLASSES:
            self.mpi_failed = True
        else:
            self.broken_off.append((other, mpi_error_text(code)))
        return 1

    # ---- slaves go -----------------------------------------------------------------------------------------------

    cdef int lose(self, int slave, str how) except -1:
        """A slave's process is gone, or as good as gone."""
        if slave in self.dead:
            return 0
        if self.said_bye[slave]:  # it left the run, and then the program
            self.dead.add(slave)
            return 0
        self.dead.add(slave)
        self.forget(slave)
        self.take_back(slave, how, True)
        return self.miss_fellows(slave, how)

    cdef int miss(self, int slave, str how) except -1:
        """A slave is not there, but may come back: nobody waits for it long at the end."""
        if slave in self.dead or self.said_bye[slave]:
            return 0
        self.missing.add(slave)
        self.take_back(slave, how, True)
        return self.miss_fellows(slave, how)

    cdef int miss_fellows(self, int slave, str how) except -1:
        """The group of this rank cannot go on without it: its others may wait for it in MPI, for ever."""
        cdef list ranks = self.fellows.get(slave, [])
        self.missing.update(rank for rank in ranks if rank != slave and rank not in self.dead and not self.said_bye[rank])
        if ranks and ranks[0] != slave:
            self.take_back(ranks[0], f"rank {slave} of its group is lost: {how}", True)
        return 0

    cdef int distrust(self, int slave, str why) except -1:
        """A rank sent what no slave sends: whatever it says in this run is worth nothing.

        What a hook raises waits for run_jobs, so that the receive is posted again first.
        """
        if self.distrusted[slave]:
            return 0
        self.distrusted[slave] = True
        self.drop_incoming(slave)
        try:
            logger.warning("rank %d is not believed any more: %s", slave, why)
            self.miss(slave, "it broke the protocol: " + why)
        except BaseException as error:
            self.fail(error)
        return 0

    cdef int reject(self, int source, str why) except -1:
        self.dropped += 1
        return self.distrust(source, why)

    cdef int forget(self, int rank) except -1:
        """Nobody waits for this rank any more."""
        self.gone[rank] = True
        aside.append(self.sending.pop(rank, None))
        return self.drop_incoming(rank)

    cdef int drop_incoming(self, int rank) except -1:
        """What is on its way from this rank may never come. A receive may hang for ever if it is waited for, or cancelled."""
        cdef int i
        self.drop_line(rank)
        for i in range(self.body_count - 1, -1, -1):
            if self.bodies[i].source == rank:
                aside.append(self.take_body(i))
        return 0

    cdef int look_for_stragglers(self, int64_t now) except -1:
        """At the end of a run: once only ranks that do not answer are waited for, they get a little more time."""
        cdef int rank
        cdef bint is_late = self.stop_by_ns and now > self.stop_by_ns
        cdef list stragglers = [rank for rank in range(1, self.size) if not (self.said_bye[rank] or self.gone[rank])]
        for rank in stragglers:
            if is_late or rank in self.missing or rank in self.doubtful:
                continue
            if rank > self.scheduler.slave_count or self.scheduler.state_of_slave(rank) < SLAVE_LOST:
                self.stragglers_since_ns = 0
                return 0
        if self.stragglers_since_ns == 0:
            self.stragglers_since_ns = now
        if is_late or now - self.stragglers_since_ns > self.grace_ns:
            for rank in stragglers:
                logger.log(logging.INFO if is_late else logging.WARNING,
                           "rank %d does not leave the run: nobody waits for it any longer", rank)
                self.missing.add(rank)
                self.forget(rank)
        return 0

    cdef int suspect(self, int slave, str how) except -1:
        if self.scheduler.state_of_slave(slave) == SLAVE_UP:
            self.doubtful.update(self.fellows.get(slave, ()))
            self.take_back(slave, how, False)
        return 0

    cdef int take_back(self, int slave, str how, bint lost) except -1:
        """What the slave holds goes to others."""
        cdef int slot, struck
        cdef list indices = []
        if slave > self.scheduler.slave_count or self.scheduler.state_of_slave(slave) == SLAVE_LOST:
            return 0  # a rank that is not used, or was lost before
        for slot in range(self.scheduler.batch_count):
            if self.scheduler.holder(slot) == slave and self.scheduler.state_of_batch(slot) == BATCH_SENT:
                indices.extend(range(self.scheduler.first(slot), self.scheduler.first(slot) + self.scheduler.jobs(slot)))
        self.drop_waiting(slave)
        struck = self.scheduler.running(slave)
        if struck >= 0 and self.scheduler.state_of_batch(struck) == BATCH_SENT:
            self.histories.setdefault(struck, []).append((slave, how))
        if lost:
            self.scheduler.on_lost(slave)
        else:
            self.scheduler.on_suspect(slave)
        self.failed_ns = coarse_ns()
        self.note("lost" if lost else "suspect", slave=slave, how=how, jobs=len(indices))
        logger.warning("slave %d is %s: %s; its %d jobs go to others", slave, "lost" if lost else "suspected", how, len(indices))
        self.attention = True
        if self.plan.on_slave_failed is not None and not self.stopping:
            try:
                self.plan.on_slave_failed(slave, sorted(indices))
            except BaseException as error:  # raised by run_jobs: what else is known now, of other slaves, must not be lost by it
                self.fail(error)
        return 0

    # ---- jobs go out again ---------------------------------------------------------------------------------------

    cdef int take_apart(self, int slot) except -1:
        """The jobs of a batch that was struck go out one by one, so that only the one to blame is given up."""
        cdef int i, count = self.scheduler.jobs(slot), strikes = self.scheduler.strikes(slot)
        cdef int64_t first = self.scheduler.first(slot)
        cdef list history = self.histories.pop(slot, [])
        cdef object jobs = self.jobs_of(slot, count)
        self.note("apart", first=first, count=count, strikes=strikes)
        for i in range(count):
            self.retry(first + i, row_of(self.job_rows, jobs, i), strikes, history)
        return self.release_slot(slot)

    cdef int retry(self, int64_t index, object job, int strikes, list history) except -1:
        self.again.append((index, job, strikes, list(history)))
        self.again_count += 1
        return 0

    cdef int fetch_again(self) except -1:
        """Jobs that go out once more come before new ones."""
        cdef int slot, strikes
        while self.again_count and self.room() > 0:
            index, job, strikes, history = self.again.popleft()
            self.again_count -= 1
            slot = self.open_slot()
            if self.job_rows is None:
                self.pack_slot(slot, [job])
            else:
                self.job_rows.put(self.slots[slot].data + HEADER_BYTES, job, "a job that goes out again")
            self.submit(slot, index, 1, strikes)
            self.histories[slot] = history
        return 0

    cdef int release_slot(self, int slot) except -1:
        self.slot_jobs[slot] = None
        if self.scheduler.release(slot) < 0:
            raise ProtocolError("cannot release " + self.scheduler.describe(slot))
        return 0
