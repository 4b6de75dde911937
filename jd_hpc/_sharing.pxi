# How the master sends the shared data (sharing.py): below _jobs.pxi. Of the bytes there is one copy, however many ask for them.

@cython.final
cdef class Share:
    """An answer on its way."""
    cdef Outgoing out
    cdef Buffer head                    # the header, and the payload where it is small

    def __cinit__(self):
        self.out.head = self.out.body = MPI_REQUEST_NULL


cdef class Sharer(Postal):
    """Carries out what sharing.Sharing names."""
    cdef object sharing                 # sharing.Sharing, or None
    cdef int64_t shared_bytes
    cdef cnp.ndarray shared_data        # the packed value
    cdef list shares                    # all answers, until the end of the run: MPI may read them, and the data
    cdef tuple gone_seen

    def share(self, cnp.ndarray data, int64_t size, address):
        """The value is there: `size` bytes, padded as a body is."""
        self.shared_data, self.shared_bytes = data, size
        self.sharing.offer(address)
        self.send_shares()

    cdef int hear_of_shared(self, int source, dict told) except -1:
        if self.sharing is None:
            raise ProtocolError(f"rank {source} asks for shared data, and there is none")
        self.sharing.hear(source, told)
        return self.send_shares()

    cdef int look_for_keepers(self, set dead, set missing) except -1:
        """Another rank takes the place of one that is gone."""
        if self.sharing is not None and (dead, missing) != self.gone_seen:  # one that was missing may die
            self.gone_seen = dead.copy(), missing.copy()
            self.sharing.lose(dead, missing)
            self.send_shares()
        return 0

    cdef int send_shares(self) except -1:
        cdef Share share
        cdef Header *header
        while (told := self.sharing.next()) is not None:
            rank, address, is_keeper = told
            share = Share()
            if address is not None:
                share.head = self.packed(address, "an address", INLINE_BYTES)
            elif self.shared_bytes <= INLINE_BYTES:
                share.head = Buffer(HEADER_BYTES + self.shared_bytes)
                memset(share.head.data, 0, HEADER_BYTES)
                memcpy(share.head.data + HEADER_BYTES, cnp.PyArray_DATA(self.shared_data), self.shared_bytes)
            else:
                share.head = Buffer(HEADER_BYTES)
                memset(share.head.data, 0, HEADER_BYTES)
            share.out.data = share.head.data
            header = <Header *> share.out.data
            header.kind, header.count, header.slot = KIND_SHARED, address is not None, is_keeper
            self.shares.append(share)
            if address is not None:
                self.send(&share.out, rank)
            else:
                header.body_bytes = self.shared_bytes
                self.send_apart(&share.out, <char *> cnp.PyArray_DATA(self.shared_data), rank)
        return 0

    cdef bint all_shared(self, int *gone) except -1:
        """Whether all answers to those that are there have gone out."""
        cdef Share share
        for share in self.shares:
            if not self.is_sent(&share.out) and not gone[share.out.dest]:
                return False
        return True
