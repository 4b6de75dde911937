# Messages of the user's own, on the master: between _jobs.pxi, which sends batches, and _survive.pxi.
#
# What comes from a slave keeps its order: a letter waits for the bodies that its slave announced before, results wait for the
# letters before them, and both are handed over by `deliver`. What goes to a slave keeps its order too: a batch waits behind the
# letters that wait for this slave. Nobody else waits.

cdef enum:
    LETTER = -1                 # stands for the slot in a parcel that is a letter
    WAITING_MOST = 1024         # letters that may wait for one slave


@cython.final
cdef class Piece:
    """What came from a slave, and stands in line."""
    cdef Header header
    cdef Buffer buffer          # None: the body is still to come
    cdef int64_t offset
    cdef set waits              # tags of the bodies that come first, its own among them


cdef class Postmaster(JobSender):
    """Sends letters to slaves, and keeps the order of what they send."""
    cdef list parcels                   # (slot, slave, results, {offset: Failure}), or (LETTER, source, message, destination)
    cdef bint attention                 # there are parcels, or a failure
    cdef object failure                 # raised by run_jobs
    cdef bint stopping
    cdef bint working                   # the master runs a job itself
    cdef bint handling                  # a handler runs
    cdef object at_once                 # what a job that the master runs has told it
    cdef int *gone                      # for each rank: nobody waits for it any more
    cdef int *distrusted                # likewise: it sent what no slave sends
    cdef dict waiting                   # slave → deque of what is still to go out to it, packed letters and slots
    cdef int64_t[::1] waiting_bytes
    cdef int[::1] unread                # for each rank: letters from it that were not handed over
    cdef dict in_line                   # source → deque of Pieces
    cdef int letters_in                 # letters that came in and were not handed over
    cdef int own_count                  # how many of these are the master's own
    cdef int64_t letters_handled
    cdef int64_t letters_dropped

    def __cinit__(self, *args):
        self.parcels = []
        self.in_line = {}
        self.at_once = deque()
        self.waiting = {}
        self.waiting_bytes = np.zeros(self.size, "i8")
        self.unread = np.zeros(self.size, "i4")

    def __dealloc__(self):
        free(self.gone)
        free(self.distrusted)

    cdef int fail(self, object error) except -1:
        if self.failure is None:
            self.failure = error
        self.attention = True
        return 0

    # ---- letters go out ------------------------------------------------------------------------------------------

    def tell(self, message, destination=0):
        """Send a message to a slave that is up, or to the master itself; whether it was sent. Never waits."""
        cdef int other = destination
        self.check_thread()
        if other == 0:
            return self.tell_itself(message)
        if not 0 < other <= self.scheduler.slave_count:
            raise MessageError(f"there is no slave {other} in this run. Cure: tell ranks 0 to {self.scheduler.slave_count}")
        return self.send_or_wait(self.packed_letter(message, 0), other)

    def broadcast(self, message):
        """Send a message to all slaves that are up; to how many it was sent. Never waits."""
        cdef int slave, count = 0
        self.check_thread()
        letter = self.packed_letter(message, 0)
        for slave in range(1, self.scheduler.slave_count + 1):
            if self.scheduler.state_of_slave(slave) == SLAVE_UP:
                count += self.send_or_wait(letter, slave)
        return count

    def poll_letters(self):
        """Nothing: the master's handlers are called between its hooks."""
        self.check_thread()
        return 0

    @cython.final
    cdef bint send_or_wait(self, Buffer letter, int slave) except -1:
        """Send a letter, or let it wait until the slave has handled others; False: the slave is not up, and it is dropped."""
        cdef int64_t size = (<Header *> letter.data).body_bytes
        if self.stopping or self.scheduler.state_of_slave(slave) != SLAVE_UP:
            self.letters_dropped += 1
            return False
        waiting = self.waiting.get(slave)
        if not waiting and self.unheard[slave] < LETTERS_MOST:
            self.unheard[slave] += 1
            self.send_letter(letter, slave)
            return True
        if waiting is None:
            waiting = self.waiting[slave] = deque()
        if len(waiting) >= WAITING_MOST \
                or (self.waiting_bytes[slave] and self.waiting_bytes[slave] + size > self.payload_limit):
            raise MessageError(
                f"slave {slave} does not handle its messages: {len(waiting)} wait for it already, in "
                f"{self.waiting_bytes[slave]} bytes. At most {WAITING_MOST} may, in payload_limit = {self.payload_limit} bytes. "
                "Cure: call self.poll() in long jobs, or send fewer")
        waiting.append(letter)
        self.waiting_bytes[slave] += size
        self.letters_waiting += 1
        return True

    cdef int send_behind(self, int slot, int slave) except -1:
        if not self.waiting.get(slave):
            return self.send(&self.slots[slot], slave)
        self.waiting[slave].append(slot)
        return 0

    @cython.final
    cdef int send_waiting(self, int slave) except -1:
        """The slave has handled letters: what waited may go."""
        cdef int slot
        cdef Buffer letter
        waiting = self.waiting.get(slave)
        while waiting:
            if not isinstance(waiting[0], Buffer):
                slot = waiting.popleft()
                self.send(&self.slots[slot], slave)
                continue
            if self.unheard[slave] >= LETTERS_MOST:
                break
            letter = waiting.popleft()
            self.letters_waiting -= 1
            self.waiting_bytes[slave] -= (<Header *> letter.data).body_bytes
            self.unheard[slave] += 1
            self.send_letter(letter, slave)
        return 0

    @cython.final
    cdef int drop_waiting(self, int slave) except -1:
        """The slave is lost or suspected: letters to it are dropped, and its batches go to others anyway."""
        cdef int dropped = sum(isinstance(what, Buffer) for what in self.waiting.pop(slave, ()))
        self.waiting_bytes[slave] = 0
        self.letters_waiting -= dropped
        self.letters_dropped += dropped
        return 0

    @cython.final
    cdef bint letters_sent(self) except -1:
        """Whether no letter is being sent any more to anybody who is there."""
        for rank in range(1, self.size):
            if not self.gone[rank] and not self.tidy(rank):
                return False
        return True

    # ---- letters come in -----------------------------------------------------------------------------------------

    @cython.final
    cdef bint waits_in_line(self, Header *header, int source) except -1:
        """Whether a message is a letter, or results that came behind one."""
        if self.stopping or self.distrusted[source]:
            return False
        if header.kind == KIND_TELL:
            return True
        return self.letters_in > 0 and source in self.in_line and (header.kind == KIND_RESULTS or header.kind == KIND_FAILURES)

    @cython.final
    cdef int accept_in_line(self, Header *header, int source, Buffer buffer) except -1:
        """Let a message stand in line, and see whose turn it is."""
        cdef Piece piece = Piece()
        try:
            piece.header = header[0]
            piece.waits = set()
            if header.kind == KIND_TELL:
                piece.waits = {self.bodies[i].header.body_tag for i in range(self.body_count) if self.bodies[i].source == source}
                self.check_letter(header, source)
            if header.body_bytes > INLINE_BYTES:
                self.expect_body(header, source, None if header.kind == KIND_TELL else self.result_rows)
                piece.waits.add(header.body_tag)
            else:
                piece.buffer = Buffer(MESSAGE_BYTES, self.result_rows, HEADER_BYTES)
                piece.offset = HEADER_BYTES
                memcpy(piece.buffer.data, buffer.data, HEADER_BYTES + header.body_bytes)
        except ProtocolError as error:
            return self.distrust(source, str(error))
        self.in_line.setdefault(source, deque()).append(piece)
        if header.kind == KIND_TELL:
            self.letters_in += 1
            self.unread[source] += 1
        return self.advance(source)

    @cython.final
    cdef int check_letter(self, Header *header, int source) except -1:
        """Refuse what no slave sends."""
        cdef int held = self.unsaid[source] + self.unread[source]
        if held >= LETTERS_MOST:
            raise ProtocolError(f"rank {source} sent a message while {held} were on their way")
        if not 0 <= header.slot < self.size or header.slot == source:
            raise ProtocolError(f"rank {source} sent a message for rank {header.slot}")
        return 0

    @cython.final
    cdef bint belongs_in_line(self, Header *header, int source, Buffer buffer) except -1:
        """Put a body into the piece that waits for it; False: no piece does."""
        cdef Piece piece
        cdef bint found = False
        for piece in self.in_line.get(source, ()):
            piece.waits.discard(header.body_tag)
            if piece.buffer is None and piece.header.body_tag == header.body_tag:
                piece.buffer = buffer
                found = True
        if found:
            self.advance(source)
        return found

    @cython.final
    cdef int advance(self, int source) except -1:
        """Deal with all in a line whose turn it is."""
        cdef Piece piece
        line = self.in_line.get(source)
        while line and not (<Piece> line[0]).waits:
            piece = line.popleft()
            self.handle_safely(&piece.header, source, piece.buffer, piece.offset)
        if line is not None and not line:
            self.in_line.pop(source, None)
        return 0

    cdef int handle_safely(self, Header *header, int source, Buffer buffer, int64_t offset) except -1:
        """Deal with a message."""
        return 0

    cdef int distrust(self, int slave, str why) except -1:
        """A rank sent what no slave sends."""
        return 0

    @cython.final
    cdef int drop_line(self, int source) except -1:
        """Nothing that this rank has sent counts any more."""
        cdef Piece piece
        for piece in self.in_line.pop(source, ()):
            if piece.header.kind == KIND_TELL:
                self.letters_in -= 1
                self.letters_dropped += 1
        return 0

    @cython.final
    cdef int open_letter(self, Header *header, int source, Buffer buffer, int64_t offset) except -1:
        """A letter's turn has come: let it be handed over with the results."""
        cdef Buffer letter
        cdef object message
        self.letters_in -= 1
        if source > self.scheduler.slave_count or self.scheduler.state_of_slave(source) == SLAVE_LOST:
            self.unread[source] -= 1
            self.letters_dropped += 1
            return self.say_heard(source)
        if header.slot == 0:
            try:
                message = unpacked(buffer, offset, offset + header.body_bytes)
            except PayloadError as error:
                raise ProtocolError(f"rank {source} sent what cannot be read: {error}") from error
        else:
            letter = message = Buffer(HEADER_BYTES + padded_bytes(header.body_bytes))
            memcpy(letter.data, header, HEADER_BYTES)
            memcpy(letter.data + HEADER_BYTES, buffer.data + offset, header.body_bytes)
        self.parcels.append((LETTER, source, message, header.slot))
        self.letters_in += 1
        self.attention = True
        return 0

    # ---- letters are handed over -----------------------------------------------------------------------------------

    @cython.final
    cdef bint tell_itself(self, object message) except -1:
        """From a job that the master runs itself: handled at once. From a hook or handler: after it."""
        if self.working:
            self.at_once.append(message)
            while self.at_once and not self.handling:
                self.handle_letter(0, self.at_once.popleft())
            return True
        if self.own_count >= WAITING_MOST:
            raise MessageError(f"the master has told itself {self.own_count} messages in one hook. Cure: call the handler")
        self.own_count += 1
        self.letters_in += 1
        self.parcels.append((LETTER, 0, message, 0))
        self.attention = True
        return True

    @cython.final
    cdef int deliver_letter(self, int source, object message, int destination) except -1:
        """It is a letter's turn: call its handler, or send it on."""
        self.letters_in -= 1
        if source == 0:
            self.own_count -= 1
        else:
            self.unread[source] -= 1
            if not self.gone[source]:
                self.say_heard(source)
        if destination == 0:
            return self.handle_letter(source, message)
        if destination > self.scheduler.slave_count:
            raise MessageError(f"slave {source} sent a message to slave {destination}, which is not in this run. Cure: tell ranks "
                               f"0 to {self.scheduler.slave_count}")
        self.address(message, source)
        self.send_or_wait(message, destination)
        return 0

    @cython.final
    cdef int handle_letter(self, int source, object message) except -1:
        self.handling = True
        try:
            self.letters_handled += 1
            for destination, reply in self.handlers.handle(source, message):
                self.tell(reply, destination)
        finally:
            self.handling = False
        return 0
