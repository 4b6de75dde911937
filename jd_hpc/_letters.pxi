# Messages of the user's own: what both sides have in common, and what a slave does with them. The master's side is _postmaster.pxi.
#
# A letter is one such message on its way. Of those that went to a rank, at most LETTERS_MOST have not been handled there: the rank
# says HEARD for every few, so that neither MPI nor a rank has to keep more. A slave waits for that, the master keeps the rest.

cdef enum:
    LETTERS_PER_WORD = LETTERS_MOST // 2    # so many are handled, and their sender hears of it
    POLL_NS = 50_000                        # poll() asks MPI no oftener: a test that finds nothing may cost a microsecond


@cython.final
cdef class Letter:
    """A letter that is being sent."""
    cdef Outgoing out
    cdef Buffer head            # the header, and the payload where it fits into the message
    cdef Buffer payload         # header and payload as they were packed: others may be sent from it too


cdef class Postal(Link):
    """Sends letters, and counts them."""
    cdef public object handlers         # messages.Handlers
    cdef dict sending                   # rank → letters to it whose send is not complete
    cdef int *unheard                   # for each rank: letters to it that it has not handled
    cdef int *unsaid                    # for each rank: letters from it that were handled, and it does not know yet
    cdef unsigned long thread           # the one that MPI is called from

    def __cinit__(self, *args):
        self.sending = {}
        self.unheard = <int *> calloc(self.size, sizeof(int))
        self.unsaid = <int *> calloc(self.size, sizeof(int))
        if self.unheard == NULL or self.unsaid == NULL:
            raise MemoryError()
        self.thread = PyThread_get_thread_ident()

    def __dealloc__(self):
        free(self.unheard)
        free(self.unsaid)

    @cython.final
    cdef int check_thread(self) except -1:
        if PyThread_get_thread_ident() != self.thread:
            raise MessageError("tell(), broadcast() and poll() were called from another thread than run(). Cure: have the thread "
                               "leave its message to the job or hook, and call them from there")
        return 0

    @cython.final
    cdef Buffer packed_letter(self, object message, int other):
        """A message as it travels; `other` is whom it is for, or where it came from."""
        cdef Buffer letter = self.packed(message, "a message of your own", self.payload_limit)
        self.address(letter, other)
        return letter

    @cython.final
    cdef int address(self, Buffer letter, int other) except -1:
        (<Header *> letter.data).kind = KIND_TELL
        (<Header *> letter.data).slot = other
        return 0

    @cython.final
    cdef int send_letter(self, Buffer payload, int dest) except -1:
        """Send what was packed. A body is not copied; the header is, since it is another one for every rank."""
        cdef Letter letter = Letter()
        cdef int64_t body_bytes = (<Header *> payload.data).body_bytes
        cdef int64_t head_bytes = HEADER_BYTES + (body_bytes if body_bytes <= INLINE_BYTES else 0)
        letter.head, letter.payload = Buffer(head_bytes), payload
        memcpy(letter.head.data, payload.data, head_bytes)
        letter.out.data = letter.head.data
        letter.out.head = letter.out.body = MPI_REQUEST_NULL
        self.tidy(dest)
        self.sending.setdefault(dest, []).append(letter)
        return self.send_apart(&letter.out, payload.data + HEADER_BYTES, dest)

    @cython.final
    cdef bint tidy(self, int rank) except -1:
        """Forget letters whose send is complete; whether none is left."""
        cdef Letter letter
        cdef list left = self.sending.get(rank)
        if left:
            left[:] = [letter for letter in left if not self.is_sent(&letter.out)]
        return not left

    @cython.final
    cdef int say_heard(self, int rank) except -1:
        """One more letter of this rank is handled."""
        cdef Buffer word
        self.unsaid[rank] += 1
        if self.unsaid[rank] == LETTERS_PER_WORD:
            word = Buffer(HEADER_BYTES)
            memset(word.data, 0, HEADER_BYTES)
            (<Header *> word.data).kind = KIND_HEARD
            (<Header *> word.data).count = self.unsaid[rank]
            self.unsaid[rank] = 0
            self.send_letter(word, rank)
        return 0

    @cython.final
    cdef int hear(self, int rank, int count) except -1:
        """A rank has handled so many of our letters."""
        if not 1 <= count <= self.unheard[rank]:
            raise ProtocolError(f"rank {rank} has handled {count} messages, and {self.unheard[rank]} are on their way to it")
        self.unheard[rank] -= count
        return 0


cdef class Correspondent(Postal):
    """What a slave does with letters: it takes them in whenever it looks, and handles them between jobs and when a job asks."""
    cdef object letters                 # [source, payload or None, body tag] in order of arrival
    cdef int letter_count               # how many these are
    cdef bint handling                  # a handler runs
    cdef bint stopped
    cdef int64_t polled_ns              # when poll() asked MPI last

    def __cinit__(self, *args):
        self.letters = deque()

    cdef bint take_in(self) except -1 nogil:
        """Take in a message."""
        return False

    @cython.final
    cdef int take_letter(self, Header *header) except -1:
        """A letter came in, or word of some that were handled."""
        cdef Buffer payload = None
        if header.kind == KIND_HEARD:
            return self.hear(0, header.count)
        if self.letter_count >= LETTERS_MOST:
            raise ProtocolError(f"the master sent a message while {self.letter_count} are still to be handled")
        if header.body_bytes > INLINE_BYTES:
            self.expect_body(header, 0, None)
        else:
            payload = Buffer(header.body_bytes)
            memcpy(payload.data, <char *> header + HEADER_BYTES, header.body_bytes)
        self.letters.append([header.slot, payload, header.body_tag])
        self.letter_count += 1
        return 0

    @cython.final
    cdef int take_letter_bodies(self) except -1:
        """Put bodies that are complete into their letters."""
        cdef int i = 0, tag
        while i < self.body_count:
            if self.bodies[i].header.kind != KIND_TELL or not self.is_complete(i):
                i += 1
                continue
            tag = self.bodies[i].header.body_tag
            body = self.take_body(i)
            for letter in self.letters:
                if letter[1] is None and letter[2] == tag:
                    letter[1] = body
        return 0

    @cython.final
    cdef int handle_letters(self) except -1:
        """Handle the letters that are complete, in order; how many these were."""
        cdef int count = 0
        cdef Buffer payload
        if self.handling:
            return 0
        if self.body_count:
            self.take_letter_bodies()
        self.handling = True
        try:
            while self.letters and self.letters[0][1] is not None:
                source, payload, _ = self.letters.popleft()
                self.letter_count -= 1
                self.say_heard(0)
                for destination, reply in self.handlers.handle(source, unpacked(payload, 0, payload.size)):
                    self.tell(reply, destination)
                count += 1
        finally:
            self.handling = False
        return count

    def tell(self, message, destination=0):
        """Send a message to the master, or through it to another slave. Waits while too many are on their way."""
        cdef int other = destination
        self.check_thread()
        if not 0 <= other < self.size or other == self.rank:
            raise MessageError(f"rank {self.rank} cannot tell rank {other} anything. Cure: 0 is the master, 1 to {self.size - 1} "
                               "are the slaves; call your own handler yourself")
        letter = self.packed_letter(message, other)
        with nogil:
            while self.unheard[0] >= LETTERS_MOST and not self.stopped:
                self.rest(self.take_in())
        if not self.stopped:
            self.unheard[0] += 1
            self.send_letter(letter, 0)

    def broadcast(self, message):
        """Refuse: the master does that."""
        raise MessageError("broadcast() is the master's. Cure: tell() the master, and have its handler broadcast")

    def poll_letters(self):
        """Handle the letters that have come; how many these were. The run's end ends the job that asks."""
        cdef int64_t now
        self.check_thread()
        if self.handling:
            return 0
        if self.letter_count == 0:
            now = monotonic_ns()
            if now - self.polled_ns < POLL_NS:
                return 0
            self.polled_ns = now
        with nogil:
            while self.take_in():
                pass
        if self.stopped:
            raise StoppedAtWork
        return self.handle_letters() if self.letter_count else 0
