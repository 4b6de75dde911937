# How the master takes results: collected without the GIL or decoded one by one, and handed to the user's hooks in batches.

cdef enum:
    COLLECT_ROWS = 8192         # results in small messages are handed over at the latest when there are so many
    COLLECT_BYTES = 1 << 20


cdef class Deliverer(Drainer):
    """Checks every result against the ledger, and hands it over with its job: once."""
    # results in small messages, collected without the GIL
    cdef bint collects
    cdef int collected
    cdef int collect_limit
    cdef Buffer collected_indices
    cdef Buffer collected_jobs
    cdef Buffer collected_results
    # all other results
    cdef list parcels                   # (slot, slave, results, {offset: Failure})
    cdef bint in_blocks                 # process_results takes them
    cdef bint tells_result              # these hooks are overridden
    cdef bint tells_idle

    def __cinit__(self, *args):
        self.parcels = []

    @cython.final
    cdef int begin_to_deliver(self) except -1:
        """Note which hooks there are, and make room."""
        self.in_blocks = self.plan.process_results is not None
        self.tells_result = self.plan.on_result is not None
        self.tells_idle = self.plan.on_slave_idle is not None
        return self.lay_out_collection()

    @cython.final
    cdef int lay_out_collection(self) except -1:
        """Small numeric results are copied together with their jobs, so that one call can hand over many."""
        cdef int64_t row_bytes, most
        if self.job_rows is None or self.result_rows is None:
            return 0
        row_bytes = max(self.job_rows.row_bytes, self.result_rows.row_bytes)
        self.collects = self.grain * row_bytes <= INLINE_BYTES
        if self.collects:
            self.collect_limit = max(1, min(<int> COLLECT_ROWS, COLLECT_BYTES // row_bytes))
            most = self.collect_limit + self.grain
            self.collected_indices = Buffer(most * sizeof(int64_t), Rows(np.dtype("i8")))
            self.collected_jobs = Buffer(most * self.job_rows.row_bytes, self.job_rows)
            self.collected_results = Buffer(most * self.result_rows.row_bytes, self.result_rows)
        return 0

    # ---- results come in -----------------------------------------------------------------------------------------

    @cython.final
    cdef int judge(self, int source, int slot, int64_t first, int count, int attempt) noexcept nogil:
        """The scheduler's verdict on an answer."""
        cdef int verdict = self.scheduler.on_result(source, slot, first, count, attempt)
        if self.keeps_history:
            self.lines.result(verdict, source, slot, first, count, attempt)
        return verdict

    @cython.final
    cdef bint is_wanted(self, Header *header, int source) except -1 nogil:
        """Whether a slave's answer is to be delivered. One to what nobody asked is no mistake of a slave that was merely late."""
        cdef int verdict
        if self.distrusted[source]:
            return False
        verdict = self.judge(source, header.slot, header.first, header.count, header.attempt)
        if verdict == VERDICT_REFUSED:
            with gil:
                self.distrust(source, f"it answers jobs {header.first} + {header.count}, which nobody gave it so")
        elif verdict == VERDICT_DELIVER and self.sent_ns != NULL:
            self.take_time(source, header.slot, header.count)
        return verdict == VERDICT_DELIVER

    @cython.final
    cdef int collect(self, Header *header, int source) except -1 nogil:
        """Copy a small result and its job to where they wait to be handed over; the slot is free at once."""
        cdef int64_t at = self.collected, k, first = header.first
        cdef int64_t *indices = <int64_t *> self.collected_indices.data + at
        cdef int64_t job_bytes = self.job_rows.row_bytes, result_bytes = self.result_rows.row_bytes
        if not self.is_wanted(header, source):
            return 0
        if not self.tells_sent:
            self.hand_out()  # first of all: the slave may be waiting
        memcpy(self.collected_jobs.data + at * job_bytes, self.slots[header.slot].data + HEADER_BYTES, header.count * job_bytes)
        memcpy(self.collected_results.data + at * result_bytes, <char *> header + HEADER_BYTES, header.count * result_bytes)
        for k in range(header.count):
            indices[k] = first + k
        self.collected += header.count
        self.scheduler.release(header.slot)
        if self.tells_result or self.tells_idle:
            with gil:
                self.tell_result(source, header.first, header.count)
        return 0

    @cython.final
    cdef int tell_result(self, int slave, int64_t first, int count) except -1:
        try:
            if self.tells_result:
                for index in range(first, first + count):
                    self.plan.on_result(slave, index)
            if self.tells_idle and self.scheduler.held(slave) == 0 and self.scheduler.waiting_count == 0:
                self.plan.on_slave_idle(slave)
        except BaseException as error:
            self.fail(error)
        return 0

    @cython.final
    cdef int parcel(self, Header *header, int source, Buffer buffer, int64_t offset) except -1:
        """A result that is large, or of objects, or with failures: decode it, and let it wait to be handed over."""
        cdef int64_t end = offset + header.body_bytes, failures_bytes = 0
        cdef dict failures = {}
        cdef object results = None
        if header.kind == KIND_FAILURES:
            end -= FAILURE_LENGTH_BYTES
            if end >= offset:
                memcpy(&failures_bytes, buffer.data + end, FAILURE_LENGTH_BYTES)
            if not 0 <= failures_bytes <= end - offset:
                raise ProtocolError(f"slave {source} sent a report of failures with a wrong length")
            end -= failures_bytes
        if self.result_rows is not None and end - offset != header.count * self.result_rows.row_bytes:
            raise ProtocolError(f"slave {source} sent {end - offset} bytes for {header.count} results")
        if failures_bytes:
            failures = self.opened(buffer, end, end + failures_bytes, dict, source)
        if not self.is_wanted(header, source):
            return 0
        if self.result_rows is not None:
            results = buffer.rows[:header.count]
        else:
            try:
                results = unpacked(buffer, offset, end)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # it was pickled well, but cannot be rebuilt here
                failures = dict.fromkeys(range(header.count), Failure.of(error))
        self.parcels.append((header.slot, source, results, failures))
        self.attention = True
        if self.tells_result or self.tells_idle:
            self.tell_result(source, header.first, header.count)
        return 0

    # ---- results are handed over ---------------------------------------------------------------------------------

    @cython.final
    cdef int deliver(self) except -1:
        """Call the user's hooks for everything that came in. New results may mean new jobs."""
        cdef int slot
        cdef list parcels
        if self.collected:
            self.exhausted = False
            self.deliver_collected()
        if self.attention:
            self.attention = False
            parcels, self.parcels = self.parcels, []
            parcels.reverse()
            while parcels:  # popped, so that each one's memory is free once it is handed over
                self.exhausted = False
                self.deliver_parcel(parcels.pop())
        slot = self.scheduler.next_given_up()
        while slot >= 0:
            self.exhausted = False
            if self.scheduler.jobs(slot) > 1 and 0 < self.scheduler.strikes(slot) == self.scheduler.max_attempts - 1:
                self.take_apart(slot)
            else:
                self.note("given_up", first=self.scheduler.first(slot), count=self.scheduler.jobs(slot),
                          strikes=self.scheduler.strikes(slot))
                lost = Failure("SlaveLost", "every slave that ran it failed", "", None)
                self.deliver_parcel((slot, 0, None, dict.fromkeys(range(self.scheduler.jobs(slot)), lost)))
            slot = self.scheduler.next_given_up()
        return 0

    @cython.final
    cdef int deliver_collected(self) except -1:
        cdef int i, count = self.collected
        cdef int64_t *indices = <int64_t *> self.collected_indices.data
        cdef object process_result = self.plan.process_result
        self.collected = 0
        if self.journal is not None:
            self.journal.record(self.collected_indices.rows[:count], self.collected_jobs.rows[:count],
                                self.collected_results.rows[:count])
        if not self.in_blocks:
            for i in range(count):
                if self.keeps_history:
                    self.lines.delivered(indices[i], 1)
                process_result(indices[i], self.job_rows.take(self.collected_jobs.data + i * self.job_rows.row_bytes),
                               self.result_rows.take(self.collected_results.data + i * self.result_rows.row_bytes))
            return 0
        if self.keeps_history:
            self.lines.delivered_all(indices, count)
        self.plan.process_results(self.collected_indices.rows[:count], self.collected_jobs.rows[:count],
                                  self.collected_results.rows[:count])
        self.collected_indices = self.collected_indices.unshared()
        self.collected_jobs = self.collected_jobs.unshared()
        self.collected_results = self.collected_results.unshared()
        return 0

    @cython.final
    cdef int deliver_parcel(self, tuple parcel) except -1:
        cdef int i, slot, slave, count
        cdef int64_t first
        slot, slave, results, failures = parcel
        first, count = self.scheduler.first(slot), self.scheduler.jobs(slot)
        jobs = self.jobs_of(slot, count)
        if self.journal is not None:
            self.hand_block(self.journal.record, first, count, jobs, results, failures)
        if self.in_blocks:
            if self.keeps_history:
                for i in range(count):
                    if i not in failures:
                        self.lines.delivered(first + i, 1)
            self.hand_block(self.plan.process_results, first, count, jobs, results, failures)
        for i in range(count):
            if i in failures:
                self.deliver_failure(slot, slave, first + i, row_of(self.job_rows, jobs, i), failures[i])
            elif not self.in_blocks:
                if self.keeps_history:
                    self.lines.delivered(first + i, 1)
                self.plan.process_result(first + i, row_of(self.job_rows, jobs, i), row_of(self.result_rows, results, i))
        self.histories.pop(slot, None)
        return self.release_slot(slot)

    @cython.final
    cdef int deliver_failure(self, int slot, int slave, int64_t index, object job, object failure) except -1:
        """A job failed: for good, or it killed the process that ran it and may have another try."""
        cdef list history = self.histories.get(slot, [])
        cdef int strikes = self.scheduler.strikes(slot) + 1
        if failure.died is not None:
            history = [*history, (slave, failure.died)]
            if strikes < self.scheduler.max_attempts:
                self.note("again", index=index, slave=slave, strikes=strikes, how=failure.died)
                return self.retry(index, job, strikes, history)
        self.note("failed", index=index, slave=slave, error=failure.type_name, died=failure.died, attempts=history)
        self.plan.process_failure(index, job, JobError(index, slave, failure, history))
        return 0

    @cython.final
    cdef int hand_block(self, take, int64_t first, int count, jobs, results, dict failures) except -1:
        """Call `take` with what did not fail."""
        cdef list good
        good = [i for i in range(count) if i not in failures]
        if not good:
            return 0
        indices = np.array(good, "i8") + first
        indices.flags.writeable = False
        take(indices, pick(jobs[:count], good), pick(results[:count], good))
        return 0

    # ---- stored results ------------------------------------------------------------------------------------------

    @cython.final
    cdef int replay(self) except -1:
        """Hand over stored results. Jobs without one go out singly, so that what is stored does not wait for a slave."""
        holes, self.exhausted = self.journal.replay(self.holes_most - self.again_count)
        for index, job in holes:
            self.retry(index, job, 0, [])
        self.next_index = self.journal.next_index
        self.replays = self.journal.replays
        self.holes_most = self.journal.holes_most
        return 0


cdef object row_of(Rows codec, object rows, int i):
    """One row or object out of a batch. A small row is copied, so that keeping it does not keep a whole message."""
    cdef cnp.ndarray array
    if codec is None or codec.row_bytes > COPY_ROW_BYTES:
        return rows[i]
    array = rows
    return codec.take(<char *> cnp.PyArray_DATA(array) + i * codec.row_bytes)
