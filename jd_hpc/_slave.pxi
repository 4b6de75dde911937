# The slave's side of _core.pyx: takes jobs in, runs them, sends results back.

cdef enum:
    BATCHES_PER_LOOK = 4        # batches between two looks at the clock


class StoppedAtWork(BaseException):
    """The master will not wait for the jobs that run."""


@cython.final
cdef class Slave(Link):
    """A rank that runs jobs.

    Parameters
    ----------
    handle : int
        The communicator's MPI handle; it must be ours alone, with errors returned.
    run : int
        Number of the run on this communicator.
    """
    cdef Evaluator evaluator
    cdef Rows job_rows
    cdef Rows result_rows
    cdef int grain
    cdef int out_count
    cdef int out_next
    cdef Outgoing *outs                 # results on their way
    cdef list out_buffers               # their memory, laid out for rows of results
    cdef char **out_data
    cdef list out_packed                # memory of what is sent instead: objects, failures, other messages
    cdef int32_t *codes                 # what the kernel returned
    cdef int *queue                     # receives that hold a message not looked at yet, in order of arrival
    cdef int queue_length
    cdef bint stopped
    cdef readonly bint failed           # the master says that ranks failed
    cdef readonly bint parted           # the goodbye has gone out
    cdef readonly bint drained          # the master says that not all jobs have ended
    cdef public object asked            # signals.Asked, or None: what is to be passed on to the master
    cdef int told_level                 # what was passed on of it
    cdef public object beat             # what sends our signs of life; it ends when the master is gone
    cdef int64_t batches                # run so far
    cdef int64_t looked_batches         # how many they were when the clock was last read
    cdef int64_t looked_in_ns           # what it said
    cdef bint is_slow                   # it had moved on since the time before

    def __dealloc__(self):
        free(self.outs)
        free(self.out_data)
        free(self.codes)
        free(self.queue)

    def begin(self, plan=None):
        """Post the receives. Without a plan the slave takes no jobs: it can only say what went wrong, and leave."""
        cdef int i, credit = plan.credit if plan else 1
        cdef int64_t out_bytes = HEADER_BYTES
        self.grain = plan.grain if plan else 1
        if plan:
            self.evaluator = plan.evaluator(self.look_out)
            self.job_rows, self.result_rows = plan.job_rows, plan.result_rows
            self.payload_limit = plan.payload_limit
            if self.result_rows is not None:
                out_bytes += padded_bytes(self.grain * self.result_rows.row_bytes)
        self.out_count = credit + 1
        self.outs = <Outgoing *> calloc(self.out_count, sizeof(Outgoing))
        self.out_data = <char **> calloc(self.out_count, sizeof(char *))
        self.codes = <int32_t *> calloc(self.grain, sizeof(int32_t))
        self.queue = <int *> calloc(credit + 2, sizeof(int))
        if not (self.outs and self.out_data and self.codes and self.queue):
            raise MemoryError()
        self.out_buffers = [None] * self.out_count
        self.out_packed = [None] * self.out_count
        for i in range(self.out_count):
            self.outs[i].head = self.outs[i].body = MPI_REQUEST_NULL
            self.set_out(i, Buffer(out_bytes, self.result_rows, HEADER_BYTES, True))
        self.post(0, credit + 2, credit + 2, self.job_rows)

    cdef int set_out(self, int i, Buffer buffer) except -1:
        self.out_buffers[i] = buffer
        self.out_data[i] = self.outs[i].data = buffer.data
        return 0

    cdef int set_packed(self, int i, Buffer buffer) except -1:
        """Send `buffer` the next time from this slot."""
        self.out_packed[i] = buffer
        self.outs[i].data = buffer.data
        return 0

    cdef int on_tick(self, int64_t now) except -1:
        if self.beat is not None and not self.beat.alive:
            raise MasterLostError()
        if self.asked is not None and self.asked.level > self.told_level and not self.parting:
            self.told_level = self.asked.level
            self.say(KIND_DRAIN, None)
        return 0

    cdef int on_mpi_error(self, int code, int other) except -1:
        cdef int kind = 0
        check(MPI_Error_class(code, &kind))
        if kind in FAILED_CLASSES:
            raise MasterLostError()
        raise_mpi_error(code)
        return -1

    def ready(self, facts):
        """Report for work."""
        self.say(KIND_READY, facts)

    def serve(self):
        """Run jobs until the master says stop."""
        try:
            with nogil:
                while not self.stopped:
                    self.rest(self.step())
        finally:
            self.parting = True

    cdef bint step(self) except -1 nogil:
        """Look for messages, then run at most one batch."""
        cdef int i
        cdef bint moved = self.is_time_to_look() and self.look()
        if self.queue_length == 0 and not self.stopped and self.take_in():
            moved = True
        if self.stopped:
            return True
        if self.body_count:
            i = self.finished_body()
            if i >= 0:
                with gil:
                    self.run_body(i)
                return True
        if self.queue_length == 0:
            return moved
        i = self.queue[0]
        self.queue_length -= 1
        if self.queue_length:
            memmove(self.queue, self.queue + 1, self.queue_length * sizeof(int))
        self.run_message(i)
        self.repost(i)
        self.batches += 1
        return True

    cdef bint is_time_to_look(self) noexcept nogil:
        """Whether time has passed: tested after every batch while batches take long, else now and then."""
        cdef int64_t now
        if self.batches == self.looked_batches or (not self.is_slow and self.batches - self.looked_batches < BATCHES_PER_LOOK):
            return False
        now = coarse_ns()
        self.is_slow = now != self.looked_in_ns
        self.looked_in_ns = now
        self.looked_batches = self.batches
        return self.is_slow

    cdef bint look(self) except -1 nogil:
        """Let signals through, and take in all messages, so that a stop is seen before the next batch."""
        cdef bint moved = False
        self.look_up(self.looked_in_ns)
        while self.take_in():
            moved = True
        return moved

    cdef bint take_in(self) except -1 nogil:
        """Take in a message: a batch is queued, what needs no work is dealt with at once."""
        cdef int i = self.poll()
        cdef Header *header
        if i < 0:
            return False
        header = <Header *> self.message_data[i]
        if not self.is_ours(i):
            self.repost(i)
        elif header.kind == KIND_STOP:
            self.stopped = True
            self.failed = header.attempt != 0
            self.drained = header.count != 0
        elif header.kind == KIND_JOBS and header.body_bytes > INLINE_BYTES:
            with gil:
                self.expect_body(header, 0, self.job_rows)
            self.repost(i)
        else:
            self.queue[self.queue_length] = i
            self.queue_length += 1
        return True

    cdef int run_message(self, int i) except -1 nogil:
        """A batch that came whole in a message."""
        if self.evaluator.function != NULL and self.evaluator.allow_nan and self.result_rows is not None:
            return self.run_compiled(<Header *> self.message_data[i])
        with gil:
            self.run_python(<Header *> self.message_data[i], self.messages[i], HEADER_BYTES)
            if (<Buffer> self.messages[i]).kept():
                self.renew_message(i)
        return 0

    cdef int run_compiled(self, Header *header) except -1 nogil:
        """Run a batch by the kernel: the GIL is taken only to tell of failures."""
        cdef int k
        self.check_jobs(header)
        k = self.free_out()
        self.answer(k, header, KIND_RESULTS, header.count * self.result_rows.row_bytes)
        if self.evaluator.run_kernel(<char *> header + HEADER_BYTES, self.outs[k].data + HEADER_BYTES, header.count, self.codes):
            with gil:
                self.send_failures(k, header, kernel_failures(<int32_t[:header.count]> self.codes))
            return 0
        return self.send(&self.outs[k], 0)

    cdef int check_jobs(self, Header *header) except -1 nogil:
        if 1 <= header.count <= self.grain and header.kind == KIND_JOBS:
            if self.job_rows is None or header.body_bytes == header.count * self.job_rows.row_bytes:
                return 0
        with gil:
            raise ProtocolError(f"the master sent a message of kind {header.kind} with {header.count} jobs in {header.body_bytes} "
                                f"bytes; grain is {self.grain}")

    cdef int run_body(self, int i) except -1:
        cdef Header header = self.bodies[i].header
        cdef Buffer buffer = self.take_body(i)
        return self.run_python(&header, buffer, 0)

    cdef int run_python(self, Header *header, Buffer buffer, int64_t offset) except -1:
        """Run a batch with the GIL: through the user's hooks, or a kernel whose payload is large."""
        cdef int k, at
        cdef Header job = header[0]
        cdef object jobs, results = None
        cdef Buffer out
        self.check_jobs(&job)
        with nogil:
            k = self.free_out()
        if self.result_rows is None:
            results = [None] * job.count
            out = None
        else:
            out = self.out_buffers[k]
        try:
            jobs = unpacked(buffer, offset, offset + job.body_bytes) if self.job_rows is None else buffer.rows
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it was pickled well, but cannot be rebuilt here
            failures = [(at, error) for at in range(job.count)]
        else:
            try:
                failures = self.evaluator.evaluate(jobs, job.count, out, results)
            except StoppedAtWork:
                return 0
        jobs = None
        if self.result_rows is None:
            self.send_objects(k, &job, results, failures)
            return 0
        out = None
        self.answer(k, &job, KIND_RESULTS, job.count * self.result_rows.row_bytes)
        self.keep_out(k)
        if failures:
            return self.send_failures(k, &job, failures)
        return self.send(&self.outs[k], 0)

    cdef int keep_out(self, int k) except -1:
        """A hook kept its `results`: send a copy, so that what it does with them later cannot change what was sent."""
        cdef Buffer given = self.out_buffers[k], fresh
        if given.kept():
            fresh = given.like()
            memcpy(fresh.data, given.data, given.size)
            self.set_out(k, fresh)
        return 0

    cdef int send_objects(self, int k, Header *job, list results, list failures) except -1:
        """Send results that are Python objects; one that cannot be pickled is that job's failure, not the others'."""
        cdef Buffer out
        try:
            out = self.packed(results, "what process_job returned", self.payload_limit)
        except PayloadError as error:
            # together they may be too large although each one is not
            failures += self.unsendable(results) or [(at, error) for at in range(job.count)]
            for at, _ in failures:
                results[at] = None
            out = self.packed(results, "what process_job returned", self.payload_limit)
        self.set_packed(k, out)
        self.answer(k, job, KIND_RESULTS, (<Header *> out.data).body_bytes)
        if failures:
            return self.send_failures(k, job, failures)
        return self.send(&self.outs[k], 0)

    cdef list unsendable(self, list results):
        cdef list failures = []
        for at, result in enumerate(results):
            try:
                self.packed(result, "what process_job returned", self.payload_limit)
            except PayloadError as error:
                failures.append((at, error))
        return failures

    cdef int send_failures(self, int k, Header *job, list failures) except -1:
        """Send the results that there are, and behind them what became of the others."""
        cdef char *results = self.outs[k].data
        cdef int64_t result_bytes = (<Header *> results).body_bytes
        # pickle sends a report that stands there twice only once
        cdef Buffer out = self.packed(Failure.of_all(failures), "the failures of a batch", REPORT_LIMIT_BYTES, result_bytes,
                                      FAILURE_LENGTH_BYTES)
        cdef int64_t total = (<Header *> out.data).body_bytes, length = total - result_bytes - FAILURE_LENGTH_BYTES
        memcpy(out.data + HEADER_BYTES, results + HEADER_BYTES, result_bytes)
        memcpy(out.data + HEADER_BYTES + result_bytes + length, &length, FAILURE_LENGTH_BYTES)
        self.set_packed(k, out)
        self.answer(k, job, KIND_FAILURES, total)
        self.send(&self.outs[k], 0)
        return 0

    cdef int answer(self, int k, Header *job, int kind, int64_t body_bytes) noexcept nogil:
        """Make the header of an answer to `job`."""
        cdef Header *header = <Header *> self.outs[k].data
        header[0] = job[0]
        header.kind = kind
        header.body_bytes = body_bytes
        return 0

    cdef int free_out(self) except -1 nogil:
        """A result slot whose last send is complete: they take turns."""
        cdef int k = self.out_next
        self.out_next = 0 if k + 1 == self.out_count else k + 1
        while not self.is_sent(&self.outs[k]):
            self.rest(self.take_in())
        self.outs[k].data = self.out_data[k]
        return k

    # ---- the end -------------------------------------------------------------------------------------------------

    cdef int say(self, int kind, object value) except -1:
        """Send a message that is not a result."""
        cdef int k
        with nogil:
            k = self.free_out()
        if value is not None:
            self.set_packed(k, self.packed(value, "a message of this slave", REPORT_LIMIT_BYTES))
        else:
            (<Header *> self.outs[k].data).body_bytes = 0
        (<Header *> self.outs[k].data).kind = kind
        if kind == KIND_DRAIN:
            (<Header *> self.outs[k].data).count = self.asked.level
            (<Header *> self.outs[k].data).attempt = self.asked.number
        self.send(&self.outs[k], 0)
        with nogil:
            while not self.is_sent(&self.outs[k]):
                self.rest(self.take_in())
        return 0

    def report(self, error):
        """Tell the master that this slave cannot go on, and why; then wait for its word to stop."""
        self.parting = True
        if self.posted == 0:
            self.begin()  # it failed before it began
        if isinstance(error, KeyboardInterrupt):
            self.say(KIND_INTERRUPT, None)
        else:
            self.say(KIND_ERROR, Failure.of(error))
        try:
            with nogil:
                while not self.stopped:
                    self.rest(self.take_in())
        except BaseException:
            self.failed = True  # likewise
            raise

    def leave(self):
        """Say goodbye: all results have gone out, and every body that was announced has come in."""
        self.parting = True
        try:
            with nogil:
                while not self.is_clear():
                    self.rest(False)
            self.unpost()  # first: what the master says after the goodbye belongs to the next run
            self.say(KIND_BYE, None)
            self.parted = True
        except BaseException:
            self.failed = True  # the master waits for the goodbye
            raise
        self.release_held()

    def look_out(self):
        """While a process of its own runs the jobs: raise StoppedAtWork, by which that process ends, when the master says stop."""
        self.look_up(coarse_ns())
        with nogil:
            while not self.stopped and self.take_in():
                pass
        if self.stopped:
            raise StoppedAtWork

    def close(self):
        """Whatever became of the run: the jobs' own process ends, if there is one."""
        if self.evaluator is not None:
            self.evaluator.close()
            self.evaluator = None  # it may hold us

    cdef bint is_clear(self) except -1 nogil:
        """Whether nothing is on its way, neither in nor out."""
        cdef int i
        if self.take_in():
            return False
        if self.body_count > 0:
            i = self.finished_body()
            if i >= 0:
                with gil:
                    self.take_body(i)
            return False
        for i in range(self.out_count):
            if not self.is_sent(&self.outs[i]):
                return False
        return True
