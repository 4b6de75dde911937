# How the master gives jobs out: the first half of _master.pxi.

cdef enum:
    FETCH_MOST = 64             # batches asked of next_job before results are looked at again

cdef list aside = []  # buffers of sends that never completed: MPI may read them until the process ends


cdef class JobSender(Sharer):
    """Asks the user for jobs, keeps them in the slots of the scheduler's ledger, and sends them to whom the scheduler names."""
    cdef readonly Scheduler scheduler
    cdef object plan
    cdef object journal                 # of this run, or None
    cdef bint replays                   # it may have results still to be delivered
    cdef int holes_most                 # jobs that it lacks and that may wait for a slave meanwhile
    cdef Rows job_rows
    cdef Rows result_rows
    cdef int grain
    cdef int read_ahead                 # batches asked for before a slave is free
    cdef object ordering                # ordering.Order, or None: results are handed over as they come
    cdef int64_t window_end             # number of the first job that must not be fetched yet
    cdef int local_below                # with fewer slaves than this the master works itself
    cdef bint allow_nan
    cdef bint tells_sent                # on_job_sent is overridden
    cdef bint keeps_history
    cdef object history                 # history.History, or None
    cdef Lines lines                    # its lines
    cdef int64_t next_index             # number of the next job
    cdef bint exhausted                 # the user has no job now; asked again once results were delivered
    cdef Outgoing *slots                # what the ledger's batches are made of
    cdef Buffer slab                    # the slots' memory, where a batch of rows fits into a message; else each has its own
    cdef list slot_buffers              # what a slot has of its own
    cdef list slot_jobs                 # the objects, where jobs are objects
    cdef dict histories                 # slot → [(slave, how)] of a batch that was struck
    cdef bint draining                  # nothing goes out (_drain.pxi)
    cdef int letters_waiting            # letters that wait for slaves to handle others (_postmaster.pxi)
    cdef int64_t *sent_ns               # when a slot was sent, where it matters how long jobs take; else NULL

    def __dealloc__(self):
        free(self.slots)
        free(self.sent_ns)

    @cython.final
    cdef int lay_out_slots(self) except -1:
        cdef int slot, count = self.scheduler.batch_count
        self.slots = <Outgoing *> calloc(count, sizeof(Outgoing))
        if self.slots == NULL:
            raise MemoryError()
        self.slot_buffers = [None] * count
        self.slot_jobs = [None] * count
        for slot in range(count):
            self.slots[slot].head = self.slots[slot].body = MPI_REQUEST_NULL
        if self.job_rows is not None and self.grain * self.job_rows.row_bytes <= INLINE_BYTES:
            self.slab = Buffer(count * self.slot_stride())
            for slot in range(count):
                self.slots[slot].data = self.slab.data + slot * self.slot_stride()
        return 0

    @cython.final
    cdef int64_t slot_stride(self) noexcept nogil:
        """Whole cache lines."""
        return (HEADER_BYTES + self.grain * self.job_rows.row_bytes + 63) // 64 * 64

    @cython.final
    cdef bint is_alone(self) noexcept nogil:
        """Whether so few slaves are left that the master does the work."""
        return not self.draining and self.scheduler.up_count + self.scheduler.absent_count < self.local_below

    @cython.final
    cdef int room(self) noexcept nogil:
        """How many batches there is room for now."""
        cdef int waiting = self.scheduler.waiting_count
        if self.draining:
            return 0
        if self.is_alone():
            return 1 - self.scheduler.open_count
        if self.scheduler.up_count == 0 or (self.read_ahead and waiting > self.read_ahead // 4):
            return 0
        return min(self.scheduler.free_credit + self.read_ahead - waiting, self.scheduler.batch_count - self.scheduler.open_count)

    @cython.final
    cdef int fresh_room(self) noexcept nogil:
        """How many batches the user may be asked for now. Jobs that go out again do not mind the window, or it might never move."""
        cdef int room = self.room()
        cdef int64_t ahead = self.window_end - self.next_index
        if room <= 0 or ahead >= <int64_t> room * self.grain:
            return room
        return <int> ((ahead + self.grain - 1) // self.grain) if ahead > 0 else 0

    @cython.final
    cdef bint hand_out(self) except -1 nogil:
        """Send what waits to whoever is ready."""
        cdef int slot, slave
        cdef bint moved = False
        while self.scheduler.waiting_count > 0 and self.scheduler.ready_count > 0:
            slot = self.scheduler.assign()
            moved = True
            slave = self.scheduler.holder(slot)
            if self.scheduler.attempt(slot) > 0:
                with gil:
                    self.renew_slot(slot)
                (<Header *> self.slots[slot].data).attempt = self.scheduler.attempt(slot)
            if self.keeps_history:
                self.note_sent(slot, slave)
            if self.sent_ns != NULL:
                self.sent_ns[slot] = coarse_ns()
            if self.letters_waiting > 0:
                with gil:
                    self.send_behind(slot, slave)
            else:
                self.send(&self.slots[slot], slave)
            if self.tells_sent:
                with gil:
                    self.tell_sent(slot, slave)
        return moved

    cdef int send_behind(self, int slot, int slave) except -1:
        """Send a batch, but behind the letters that wait for this slave."""
        return self.send(&self.slots[slot], slave)

    @cython.final
    cdef int note_sent(self, int slot, int slave) noexcept nogil:
        return self.lines.sent(slave, slot, self.scheduler.first(slot), self.scheduler.jobs(slot), self.scheduler.attempt(slot))

    @cython.final
    cdef int tell_sent(self, int slot, int slave) except -1:
        cdef int64_t first = self.scheduler.first(slot)
        for index in range(first, first + self.scheduler.jobs(slot)):
            self.plan.on_job_sent(slave, index)
        return 0

    @cython.final
    cdef int fetch(self) except -1:
        """Ask the user for jobs, as many as can be given out now."""
        cdef int count
        if self.exhausted:
            return 0
        count = self.fresh_room()
        if count <= 0:
            return 0
        if self.plan.next_jobs is not None:
            return self.fetch_block(count)
        for _ in range(min(count, <int> FETCH_MOST)):
            if not self.exhausted:
                self.fetch_singly()
        return 0

    @cython.final
    cdef int fetch_singly(self) except -1:
        """Fill one batch by next_job, and send it if a slave is free."""
        cdef int slot = self.open_slot(), count = 0
        cdef object value
        cdef list objects = []
        while count < self.grain:
            value = self.plan.next_job()
            if value is None:
                self.exhausted = True
                break
            if self.job_rows is None:
                objects.append(value)
            else:
                try:
                    self.job_rows.put(self.slots[slot].data + HEADER_BYTES + count * self.job_rows.row_bytes, value,
                                      "what next_job returned")
                except PayloadError as error:
                    error.add_note(f"This was job {self.next_index + count}.")
                    raise
            count += 1
        if count == 0:
            self.scheduler.cancel(slot)
            return 0
        if self.job_rows is None:
            self.pack_slot(slot, objects)
        elif not self.allow_nan:
            check_finite(self.jobs_of(slot, count), "what next_job returned")
        self.submit(slot, self.next_index, count, 0)
        self.next_index += count
        if not self.is_alone():
            self.hand_out()  # a few hundred ns: giving up the GIL for it costs more
        return 0

    @cython.final
    cdef int fetch_block(self, int count) except -1:
        """Take a block of jobs from next_jobs and cut it into batches."""
        cdef int64_t at, length, most = <int64_t> count * self.grain
        cdef int slot, n
        cdef char *where = NULL
        cdef cnp.ndarray rows
        value = self.plan.next_jobs(most)
        length = block_length(value, most)
        if length == 0:
            self.exhausted = True
            return 0
        if self.job_rows is not None:
            rows = self.job_rows.as_block(value, "what next_jobs returned")
            if not self.allow_nan:
                check_finite(rows, "what next_jobs returned")
            where = <char *> cnp.PyArray_DATA(rows)
        for at in range(0, length, self.grain):
            slot = self.open_slot()
            n = min(self.grain, length - at)
            if where == NULL:
                self.pack_slot(slot, list(value[at:at + n]))
            else:
                memcpy(self.slots[slot].data + HEADER_BYTES, where + at * self.job_rows.row_bytes, n * self.job_rows.row_bytes)
            self.submit(slot, self.next_index, n, 0)
            self.next_index += n
        return 0

    @cython.final
    cdef int open_slot(self) except -1:
        """A free slot of the ledger, with memory that nobody else holds."""
        cdef int slot = self.scheduler.open()
        cdef Buffer buffer
        if slot < 0:
            raise ProtocolError(f"no slot is free: {self.scheduler.open_count} of {self.scheduler.batch_count} are open")
        if not self.is_sent(&self.slots[slot]):
            self.set_aside(slot)
        elif self.slab is not None:
            return slot
        else:
            buffer = self.slot_buffers[slot]
            if buffer is not None and not buffer.kept():
                return slot
        if self.job_rows is not None:
            self.set_slot(slot, self.fresh_buffer())
        return slot

    @cython.final
    cdef Buffer fresh_buffer(self):
        return Buffer(HEADER_BYTES + padded_bytes(self.grain * self.job_rows.row_bytes), self.job_rows, HEADER_BYTES)

    @cython.final
    cdef int set_slot(self, int slot, Buffer buffer) except -1:
        self.slot_buffers[slot] = buffer
        self.slots[slot].data = buffer.data
        return 0

    @cython.final
    cdef object jobs_of(self, int slot, int count):
        """The jobs of a batch, for a hook: rows or a list of objects."""
        cdef Buffer buffer
        if self.job_rows is None:
            return self.slot_jobs[slot]
        buffer = self.slot_buffers[slot]
        if buffer is None:  # in the slab, which the hook must not keep
            buffer = self.fresh_buffer()
            memcpy(buffer.data, self.slots[slot].data, HEADER_BYTES + count * self.job_rows.row_bytes)
        return buffer.rows[:count]

    @cython.final
    cdef int set_aside(self, int slot) except -1:
        """A send that does not complete keeps its memory until the end: whoever it was for is gone."""
        cdef Outgoing *out = &self.slots[slot]
        aside.append(self.slot_buffers[slot] or self.slab)
        if out.head != MPI_REQUEST_NULL:
            check(MPI_Request_free(&out.head))
        if out.body != MPI_REQUEST_NULL:
            check(MPI_Request_free(&out.body))
        return 0

    @cython.final
    cdef int renew_slot(self, int slot) except -1:
        """Before a batch is sent again: nothing else can be sent from memory whose send is not complete."""
        cdef Buffer old = self.slot_buffers[slot], fresh
        cdef char *data = self.slots[slot].data
        if self.is_sent(&self.slots[slot]):
            return 0
        self.set_aside(slot)
        fresh = self.fresh_buffer() if old is None else old.like()
        memcpy(fresh.data, data, HEADER_BYTES + (<Header *> data).body_bytes)
        return self.set_slot(slot, fresh)

    @cython.final
    cdef int pack_slot(self, int slot, list objects) except -1:
        cdef Buffer buffer
        try:
            buffer = self.packed(objects, "what next_job returned", self.payload_limit)
        except PayloadError as error:
            more = f", or one of the {len(objects)} from there on" if len(objects) > 1 else ""
            error.add_note(f"This was job {self.next_index}{more}.")
            raise
        self.set_slot(slot, buffer)
        self.slot_jobs[slot] = objects
        return 0

    @cython.final
    cdef int submit(self, int slot, int64_t first, int count, int strikes) except -1:
        """The slot is filled: let it wait for a slave."""
        cdef Header *header = <Header *> self.slots[slot].data
        header.kind = KIND_JOBS
        header.first = first
        header.count = count
        header.attempt = 0
        header.slot = slot
        if self.job_rows is not None:  # a packed buffer knows its size
            header.body_bytes = count * self.job_rows.row_bytes
        if len(self.histories) > 0:
            self.histories.pop(slot, None)  # the slot's last batch had one, and was delivered without a look at it
        if self.scheduler.submit(slot, first, count, strikes) < 0:
            raise ProtocolError("cannot submit " + self.scheduler.describe(slot))
        return 0
