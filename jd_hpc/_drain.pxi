# How the master comes to an end before the jobs do: between _survive.pxi, whose ticks it gets, and _delivery.pxi.

cdef enum:
    TIMES_MOST = 64             # durations noted between two looks at the clock: the others are not needed
    PATIENCE_NS = 1_000_000_000  # how long slaves whose jobs are cut off may take to leave: only those of isolate can


cdef class Drainer(Survivor):
    """Notes how long jobs take, gives out what walltime.Drain allows, and knows what is left when the run is drained."""
    cdef object drain                   # walltime.Drain, or None
    cdef object asked                   # signals.Asked, or None
    cdef int heard_level                # what was heard of it
    cdef bint cut_off                   # what still runs is to be left alone
    cdef bint looked_last               # ... and what had come in by then was taken in
    cdef readonly object left           # (jobs that ended, put back, cut off) of a run that was drained; None: all have ended
    cdef int64_t *answered_ns           # when a slave answered last
    cdef int time_count
    cdef double[TIMES_MOST] times_s     # how long jobs took

    def __dealloc__(self):
        free(self.answered_ns)

    def drain_by(self, drain, asked):
        """Have what decides when nothing more goes out, and where signals are noted. To be called after `begin`."""
        self.drain, self.asked = drain, asked
        if drain.is_clocked:
            self.sent_ns = <int64_t *> calloc(self.scheduler.batch_count, sizeof(int64_t))
            self.answered_ns = <int64_t *> calloc(self.size, sizeof(int64_t))
            if self.sent_ns == NULL or self.answered_ns == NULL:
                raise MemoryError()

    cdef int take_time(self, int slave, int slot, int count) except -1 nogil:
        """A slave has answered: it began when the batch was sent, or when it had answered the one before."""
        cdef int64_t now = coarse_ns()
        cdef int64_t begun_ns = max(self.sent_ns[slot], self.answered_ns[slave])
        self.answered_ns[slave] = now
        return self.note_time((now - begun_ns) / <double> count)

    cdef int note_time(self, double job_ns) except -1 nogil:
        if self.time_count < TIMES_MOST:
            self.times_s[self.time_count] = job_ns * 1e-9
            self.time_count += 1
        return 0

    cdef int look_at_the_clock(self, int64_t now) except -1:
        cdef int i, credit
        cdef list times_s
        if self.drain is None:
            return 0
        if self.asked is not None and self.asked.level > self.heard_level:
            self.heard_level = self.asked.level
            pass_on(self.drain, now * 1e-9, self.asked.level, self.asked.number, self.rank)
        times_s = [self.times_s[i] for i in range(self.time_count)]
        self.time_count = 0
        credit = self.drain.tick(now * 1e-9, times_s)
        if credit != self.scheduler.credit:
            self.scheduler.limit_credit(credit)
            self.draining = credit == 0
            self.attention = True
        if self.drain.cut_off and not self.cut_off:
            self.cut_off = self.attention = True
        return 0

    @cython.final
    cdef bint can_replay(self) noexcept nogil:
        """Whether the journal may have results for the jobs that the user gives next."""
        return self.replays and not self.exhausted and self.again_count < self.holes_most and self.next_index < self.window_end

    cdef bint has_drained(self) except -1:
        """Whether nothing is on its way any more, or nobody waits for it; `left` then says what is left, if anything."""
        cdef int slot, put_back = 0, cut_off = 0
        if self.attention or not (self.cut_off or self.scheduler.held_count == 0):
            return False
        if self.can_replay() and not self.cut_off:
            return False  # what the journal has costs no time
        if self.cut_off and not self.looked_last:
            self.looked_last = True
            self.take_in_all()
            return False
        if not (self.exhausted or self.replays) and self.scheduler.open_count == 0 and self.again_count == 0:
            self.ask_for_one()  # with what came in there may be more, or not
        for slot in range(self.scheduler.batch_count):
            if self.scheduler.state_of_batch(slot) == BATCH_WAITING:
                put_back += self.scheduler.jobs(slot)
            elif self.scheduler.state_of_batch(slot) == BATCH_SENT:
                cut_off += self.scheduler.jobs(slot)
        put_back += self.again_count
        if put_back + cut_off > 0 or (self.replays and not self.exhausted):
            self.left = (self.next_index - put_back - cut_off, put_back, cut_off)
        return True

    cdef int take_in_all(self) except -1:
        """Take in what has come."""
        return 0

    cdef int ask_for_one(self) except -1:
        """Ask the user for a batch: to see whether there is any."""
        return self.fetch_block(1) if self.plan.next_jobs is not None else self.fetch_singly()

    cdef int prepare_to_part(self, int64_t now) except -1:
        """A run that was drained does not wait for ever for slaves that still work."""
        cdef double stop_by_s
        if self.left is None:
            return 0
        stop_by_s = self.drain.stop_by_s(now * 1e-9, PATIENCE_NS * 1e-9)
        self.stop_by_ns = <int64_t> (stop_by_s * 1e9) if stop_by_s < 1e9 else 0
        # nobody can get a slave out of a job, but for one that runs in a process of its own
        self.failed = self.failed or (self.left[2] > 0 and not self.plan.isolate)
        return 0
