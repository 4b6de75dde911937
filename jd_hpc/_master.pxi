# The master's side of _core.pyx: runs the loop, and begins and ends the run.

cdef enum:
    POSTED = 4                  # receives: more are no faster (measured), MPI keeps what comes in meanwhile
    SINGLES_MOST = 64           # ... or so many, where each is handed over by itself
    BLOCK_PATIENCE_POLLS = SPIN_POLLS + 16  # ... or after so many polls without a message: not while others run on this core


@cython.final
cdef class Master(Deliverer):
    """Rank 0: gives out jobs and takes results in.

    Parameters
    ----------
    handle : int
        The communicator's MPI handle; it must be ours alone, with errors returned.
    run : int
        Number of the run on this communicator.
    """
    cdef readonly bint stop_began
    cdef bint woken                     # another thread has jobs
    cdef readonly int slave_count       # ranks 1 .. slave_count are used; the others wait for the end
    cdef Evaluator evaluator
    cdef list early_in                  # what came in for this run while the last one ended

    def __cinit__(self, uintptr_t handle, int64_t run, uint32_t[::1] body_turn, list early, set dead, set missing):
        self.dead, self.missing = dead, missing
        self.histories = {}
        self.shares = []
        self.fellows, self.doubtful = {}, set()
        self.again = deque()
        self.broken_off = []
        self.early_in = early[:]
        early.clear()
        self.early = early  # the channel's list: what comes early in this run is there for the next one, however this one ends
        self.said_bye = <int *> calloc(self.size, sizeof(int))
        self.gone = <int *> calloc(self.size, sizeof(int))
        self.distrusted = <int *> calloc(self.size, sizeof(int))
        if self.said_bye == NULL or self.gone == NULL or self.distrusted == NULL:
            raise MemoryError()
        for rank in dead:
            self.gone[rank] = True

    def begin(self, plan, int slave_count):
        """Post the receives and lay out the slots. Without a plan the master can only tell the slaves to stop."""
        cdef int credit = plan.credit if plan else 1
        cdef int limit = max(1, slave_count * credit)
        self.slave_count = slave_count
        if plan:
            self.job_rows, self.result_rows = plan.job_rows, plan.result_rows
            self.payload_limit = plan.payload_limit
        # a body on its way for every batch given out, every letter, and for what each rank says besides
        if self.posted == 0:
            self.post(MPI_ANY_SOURCE, POSTED, limit + (2 + LETTERS_MOST) * self.size, self.result_rows)
        if not plan:
            self.scheduler = self.scheduler or Scheduler(0, 1, 1)
            self.stopping = True
            return
        self.plan = plan
        self.ordering = plan.order
        self.window_end = (<int64_t> 1 << 62) if self.ordering is None else self.ordering.window_end
        self.sharing, self.fellows = plan.sharing, plan.fellows
        self.journal = plan.journal
        if self.journal is not None:
            self.replays, self.holes_most = self.journal.replays, self.journal.holes_most
        self.grain, self.read_ahead, self.allow_nan = plan.grain, plan.read_ahead, plan.allow_nan
        self.local_below = max(1, plan.min_slaves)
        self.tells_sent = plan.on_job_sent is not None
        self.history = plan.history
        self.keeps_history = self.history is not None
        self.lines = self.history.lines if self.keeps_history else None
        self.scheduler = Scheduler(slave_count, credit, limit + self.read_ahead, plan.max_attempts)
        for rank in range(1, slave_count + 1):
            if rank in self.dead or rank in self.missing:  # since an earlier run
                self.scheduler.on_lost(rank)
                self.note("lost", slave=rank, how="in an earlier run", jobs=0)
        self.lay_out_slots()
        self.begin_to_deliver()
        self.accept_early()

    # ---- the run -------------------------------------------------------------------------------------------------

    def run_jobs(self):
        """Run until there is no job left and all results are delivered. May be called again, unless it raised."""
        self.parting = self.exhausted = False
        try:
            self.look_at_the_clock(coarse_ns())
            while True:
                if self.failure is not None:
                    raise self.failure
                self.deliver()
                if self.woken:
                    self.woken = self.exhausted = False
                if self.draining and self.has_drained():
                    return
                self.fetch_again()
                if self.can_replay():
                    self.replay()
                elif not self.again_count:
                    self.fetch()
                if self.exhausted and self.scheduler.open_count == 0 and not (self.collected or self.attention or self.again_count):
                    return
                if self.is_alone():
                    self.work_locally()
                    with nogil:
                        self.look_up(coarse_ns())
                else:
                    with nogil:
                        self.pump()
        finally:
            self.parting = True

    def wake(self):
        """There are jobs again: from any thread, while run_jobs runs."""
        self.woken = True

    def break_off(self, error):
        """Have run_jobs raise this: from any thread."""
        self.fail(error)

    def look_around(self):
        """Between two calls of run_jobs, now and then: hear who is still there."""
        self.take_in_all()
        self.look_up(coarse_ns())

    cdef int pump(self) except -1 nogil:
        """Move messages until Python is needed."""
        cdef bint moved
        cdef int empty_polls = 0
        while True:
            moved = self.hand_out()
            if self.take_in():
                moved = True
                empty_polls = 0
            else:
                empty_polls += 1
            if self.body_count > 0 and self.take_bodies():
                moved = True
            self.rest(moved)
            if self.wants_python(empty_polls):
                return 0

    cdef bint wants_python(self, int empty_polls) noexcept nogil:
        if self.attention or self.woken or self.is_alone() or self.can_replay():
            return True
        if self.draining and (self.cut_off or self.scheduler.held_count == 0):
            return True
        if self.collected == 0:
            return self.room() > 0 if self.again_count > 0 else not self.exhausted and self.fresh_room() > 0
        if not self.in_blocks:  # one turn of the GIL for all that is there
            return empty_polls > 0 or self.collected >= SINGLES_MOST
        if self.collected >= self.collect_limit or empty_polls > BLOCK_PATIENCE_POLLS:
            return True
        if self.exhausted or self.next_index >= self.window_end:  # with these results there may be new jobs for the slaves
            return empty_polls > 0 and self.scheduler.waiting_count == 0
        return self.fresh_room() > 0

    # ---- results come in -----------------------------------------------------------------------------------------

    cdef bint take_in(self) except -1 nogil:
        """Take in a message. A small numeric result is collected, the rest needs Python."""
        cdef int i = self.poll(), source = self.status.MPI_SOURCE
        cdef Header *header
        if i < 0:
            return False
        header = <Header *> self.message_data[i]
        if not self.is_ours(i):
            pass
        elif self.collects and self.letters_in == 0 and header.kind == KIND_RESULTS \
                and header.body_bytes == header.count * self.result_rows.row_bytes:
            self.collect(header, source)
        else:
            with gil:
                self.accept(i, source)
        self.repost(i)
        return True

    cdef int take_in_all(self) except -1:
        with nogil:
            while self.take_in() or (self.body_count > 0 and self.take_bodies()):
                pass
        return 0

    cdef int accept(self, int i, int source) except -1:
        """A message that needs Python."""
        self.accept_message(self.messages[i], source)
        if (<Buffer> self.messages[i]).kept():
            self.renew_message(i)
        return 0

    cdef int came_in(self, int i, int source) except -1:
        return self.accept(i, source)

    cdef int accept_early(self) except -1:
        """Deal with the messages that came in while the run before this one ended."""
        cdef Buffer buffer
        while self.early_in:
            source, data = self.early_in.pop(0)
            buffer = Buffer(MESSAGE_BYTES, self.result_rows, HEADER_BYTES)
            memcpy(buffer.data, <const char *> <bytes> data, len(data))
            self.accept_message(buffer, source)
        return 0

    cdef int accept_message(self, Buffer buffer, int source) except -1:
        """A whole message is handled; a longer one's body is received first."""
        cdef Header header = (<Header *> buffer.data)[0]
        if self.waits_in_line(&header, source):
            return self.accept_in_line(&header, source, buffer)
        if header.body_bytes <= INLINE_BYTES:
            return self.handle_safely(&header, source, buffer, HEADER_BYTES)
        try:
            if not self.distrusted[source]:
                self.expect_body(&header, source, self.result_rows if header.kind in (KIND_RESULTS, KIND_FAILURES) else None)
        except ProtocolError as error:
            self.distrust(source, str(error))
        return 0

    cdef bint take_bodies(self) except -1 nogil:
        cdef int i = self.finished_body()
        if i < 0:
            return False
        with gil:
            self.accept_body(i)
        return True

    cdef int accept_body(self, int i) except -1:
        cdef Header header = self.bodies[i].header
        cdef int source = self.bodies[i].source
        cdef Buffer buffer = self.take_body(i)
        if self.letters_in and not self.stopping and self.belongs_in_line(&header, source, buffer):
            return 0
        self.handle_safely(&header, source, buffer, 0)
        return self.advance(source) if self.letters_in and not self.stopping else 0

    cdef int handle_safely(self, Header *header, int source, Buffer buffer, int64_t offset) except -1:
        """Deal with a message. What goes wrong is raised by run_jobs later; what breaks the protocol is its sender's loss."""
        try:
            self.handle(header, source, buffer, offset)
        except ProtocolError as error:
            self.distrust(source, str(error))
        except BaseException as error:
            self.fail(error)
        return 0

    cdef int handle(self, Header *header, int source, Buffer buffer, int64_t offset) except -1:
        """Deal with a message that is complete."""
        cdef int64_t end = offset + header.body_bytes
        if header.kind == KIND_BYE:
            if not self.stopping:
                self.distrust(source, "it left the run before the end")
            self.said_bye[source] = True
        elif header.kind == KIND_BROKEN:
            self.lose_group(source, self.opened(buffer, offset, end, Failure, source))
        elif self.stopping or self.distrusted[source]:
            return 0  # whatever a slave still says
        elif header.kind == KIND_RESULTS or header.kind == KIND_FAILURES:
            self.parcel(header, source, buffer, offset)
        elif header.kind == KIND_TELL:
            self.open_letter(header, source, buffer, offset)
        elif header.kind == KIND_HEARD:
            self.hear(source, header.count)
            self.send_waiting(source)
        elif header.kind == KIND_READY:
            if source <= self.slave_count:
                self.greet(source, self.opened(buffer, offset, end, dict, source))
        elif header.kind == KIND_SHARED:
            if source <= self.slave_count or source in self.fellows:
                self.hear_of(source, self.opened(buffer, offset, end, dict, source))
        elif header.kind == KIND_DRAIN:
            if not is_request(header.count, header.attempt):
                raise ProtocolError(f"rank {source} asks to drain at level {header.count} because of signal {header.attempt}")
            if self.drain is not None:
                pass_on(self.drain, coarse_ns() * 1e-9, header.count, header.attempt, source)
        elif header.kind == KIND_INTERRUPT:
            self.doubtful.update(self.fellows.get(source, ()))
            self.fail(KeyboardInterrupt(f"slave {source} was interrupted"))
        elif header.kind == KIND_ERROR:
            self.doubtful.update(self.fellows.get(source, ()))
            self.fail(SlaveError(source, self.opened(buffer, offset, end, Failure, source)))
        else:
            raise ProtocolError(f"rank {source} sent a message of kind {header.kind}")
        return 0

    cdef bint agrees(self, int slave, dict facts) except -1:
        """Whether a slave runs the same; if not, that is the end of the run."""
        wrong = self.plan.differences(facts)
        if wrong:
            self.fail(RanksDisagreeError(f"slave {slave} and the master disagree: {wrong}; start all ranks with the same "
                                         "script, options and environment"))
        return not wrong

    cdef int hear_of(self, int slave, dict told) except -1:
        """A slave speaks of the shared data. Whether it runs the same as the master shows first."""
        facts = told.get(ASKS, {})
        if facts and not self.agrees(slave, facts):
            return 0
        return self.hear_of_shared(slave, told)

    cdef int greet(self, int slave, dict facts) except -1:
        """A slave reports for work."""
        if slave in self.dead:  # it did so before it died, and nobody will tell again that it is gone
            return 0
        if not self.agrees(slave, facts):
            return 0
        if self.scheduler.on_ready(slave) < 0:
            raise ProtocolError(f"slave {slave} reports for work twice")
        self.missing.discard(slave)
        self.note("up", slave=slave)
        if self.plan.on_slave_started is not None:
            self.plan.on_slave_started(slave)
        return 0

    cdef int lose_group(self, int source, object failure) except -1:
        """A rank of a group has failed, and others do not come out of the job: that is the job's failure, and the group's end."""
        cdef int leader, slot
        if source not in self.fellows:
            raise ProtocolError(f"rank {source} speaks for a group, and is in none")
        leader = self.fellows[source][0]
        slot = self.scheduler.running(leader)
        if slot >= 0 and not self.stopping and self.scheduler.state_of_batch(slot) == BATCH_SENT:
            if self.judge(leader, slot, self.scheduler.first(slot), 1, self.scheduler.attempt(slot)) == VERDICT_DELIVER:
                self.parcels.append((slot, leader, None, {0: failure}))
                self.attention = True
        return self.miss(leader, f"its group is stuck: {failure.type_name} on one rank, and others wait for it")

    cdef int work_locally(self) except -1:
        """Too few slaves are left: the master runs one batch itself."""
        cdef int slot, count
        cdef Buffer out = None
        cdef list objects = None
        cdef int64_t begun_ns = coarse_ns()
        if not self.plan.local_fallback and self.scheduler.lost + self.scheduler.suspected > 0:
            raise SlavesLostError(self.scheduler.lost, self.scheduler.suspect_count)
        slot = self.scheduler.assign_local(self.plan.isolate, self.others_may_help())
        if slot < 0:
            self.attention = True  # batches may have been given up
            with nogil:
                self.hand_out()  # what the master does not touch
                self.rest(self.take_in())  # a slave may still say something
            return 0
        if self.evaluator is None:
            self.evaluator = self.plan.evaluator()
        if self.keeps_history:
            self.note_sent(slot, 0)
        count = self.scheduler.jobs(slot)
        if self.result_rows is None:
            objects = [None] * count
        else:
            out = Buffer(count * self.result_rows.row_bytes, self.result_rows, 0, True)
        jobs = self.jobs_of(slot, count)
        self.working = True
        try:
            failures = Failure.of_all(self.evaluator.evaluate(jobs, count, out, objects, self.scheduler.first(slot)))
        finally:
            self.working = False
        if self.sent_ns != NULL:
            self.note_time((coarse_ns() - begun_ns) / count)
        if self.judge(0, slot, self.scheduler.first(slot), count, self.scheduler.attempt(slot)) == VERDICT_DELIVER:
            if out is not None:
                out.rows.flags.writeable = False
            self.parcels.append((slot, 0, objects if out is None else out.rows, failures))
            self.attention = True
        return 0

    cdef bint others_may_help(self) noexcept:
        """Whether a slave may still take what the master does not touch, because it has killed one."""
        if self.scheduler.up_count > 0:
            return True
        return self.scheduler.suspect_count > 0 and coarse_ns() - self.failed_ns < self.grace_ns

    # ---- facts ---------------------------------------------------------------------------------------------------

    cdef int64_t done_count(self) except -1:
        cdef int slot, state
        cdef int64_t count = self.next_index - self.again_count - self.collected
        if self.ordering is not None:
            count -= self.ordering.held
        for slot in range(self.scheduler.batch_count):
            state = self.scheduler.state_of_batch(slot)
            if state == BATCH_WAITING or state == BATCH_SENT or state == BATCH_ENDED:
                count -= self.scheduler.jobs(slot)
        return max(0, count)

    def counters(self):
        """What happened so far, for the log."""
        return {"jobs": self.next_index, "messages sent": self.scheduler.sent, "late results dropped": self.scheduler.late,
                "messages refused": self.scheduler.refused + self.dropped, "batches sent again": self.scheduler.resent,
                "slaves lost": self.scheduler.lost, "slaves suspected": self.scheduler.suspected,
                "slaves reinstated": self.scheduler.reinstated,
                "own messages handled": self.letters_handled, "own messages dropped": self.letters_dropped,
                "from journal": 0 if self.journal is None else self.journal.delivered}

    # ---- the end -------------------------------------------------------------------------------------------------

    def stop(self):
        """Tell every rank that the run is over, and wait until each has left it. Results that still come in are dropped."""
        cdef Outgoing *stops = <Outgoing *> calloc(self.size, sizeof(Outgoing))
        cdef list buffers = [Buffer(HEADER_BYTES) for _ in range(self.size)]
        cdef int rank
        if stops == NULL:
            raise MemoryError()
        self.parting = self.stop_began = True
        try:
            self.stopping = True
            self.collects = False
            self.failed = bool(self.dead or self.missing or self.scheduler.suspect_count)
            self.prepare_to_part(coarse_ns())
            self.accept_early()
            for rank in range(1, self.size):
                stops[rank].head = stops[rank].body = MPI_REQUEST_NULL
                stops[rank].data = (<Buffer> buffers[rank]).data
                memset(stops[rank].data, 0, HEADER_BYTES)
                (<Header *> stops[rank].data).kind = KIND_STOP
                (<Header *> stops[rank].data).attempt = self.failed  # a slave that knows leaves MPI alone at its exit
                (<Header *> stops[rank].data).count = self.left is not None
                if not self.gone[rank]:
                    self.send(&stops[rank], rank)
            with nogil:
                while not self.is_over(stops):
                    self.rest(self.take_in() or (self.body_count > 0 and self.take_bodies()))
            self.unpost()
            if self.evaluator is not None:
                self.evaluator.close()
            self.failed = bool(self.failed or self.dead or self.missing)
            if self.failed:
                # what was sent to them may still be read
                aside.extend((buffers, self.slot_buffers, self.slab, self.shares, self.shared_data, self.sending))
        except BaseException:
            # The user will not wait: MPI may still write to and read from all of these, and ranks wait for a word.
            self.failed = True
            aside.extend((buffers, self.messages, self.body_buffers, self.slot_buffers, self.slab))
            aside.extend((self.shares, self.shared_data, self.sending))
            raise
        finally:
            self.parting = False
            free(stops)
        self.release_held()

    cdef bint is_over(self, Outgoing *stops) except -1 nogil:
        """Whether every rank was told and has left, and nothing is on its way."""
        cdef int rank
        for rank in range(1, self.size):
            if not self.gone[rank] and not (self.said_bye[rank] and self.is_sent(&stops[rank])):
                return False
        if self.body_count > 0 or not self.all_sent():
            return False
        with gil:
            return self.all_shared(self.gone) and self.letters_sent()

    cdef bint all_sent(self) except -1 nogil:
        """Whether no slot is being sent any more to anybody who is there."""
        cdef int slot
        if self.slots != NULL:
            for slot in range(self.scheduler.batch_count):
                if not self.is_sent(&self.slots[slot]) and not self.gone[self.slots[slot].dest]:
                    return False
        return True
