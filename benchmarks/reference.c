/* A master-slave loop in plain C and MPI, as a good MPI programmer writes it by hand for one problem.
 * It is the yardstick for the compiled loop of jd_hpc, so it does everything that such a loop cannot leave out
 * (jobs come from an array, results go to their place in an array and are all checked, no buffer is reused before its
 * request is complete) and nothing that only a general dispatcher needs (no retries, no time-outs, no hooks).
 *
 *   mpicc -O3 -o reference reference.c kernel.c
 *   mpiexec -n 4 ./reference farm [--jobs N | --seconds S] [--flight K] [--grain G] [--single]
 *                                 [--recvs P] [--spin A] [--yield B]
 *   mpiexec -n 2 ./reference pingpong BYTES REPS
 *
 * Each mode prints one line of JSON. A job is two doubles (16 bytes), a result is one double (8 bytes). */
#include <mpi.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { JOB_TAG = 1, RESULT_TAG = 2, STOP_TAG = 3 };
enum { JOB_BYTES = 16, RESULT_BYTES = 8 };
enum { BLOCK = 4096 };            /* jobs are made, and results checked, this many at a time */
enum { MAX_PAUSE_NS = 500000 };

typedef int32_t kernel_function(const void *job, void *result, void *user_data);
extern kernel_function add_kernel;

/* Travels in front of every job message and comes back in front of its results: `first` says where the results
 * belong, `slot` which buffer of the master is free again. */
typedef struct {
    int64_t first;
    int32_t count;
    int32_t slot;
} header_t;

typedef struct {
    int64_t jobs;                 /* 0: as many as fill `seconds` */
    double seconds;
    int flight, grain, recvs, spin, yield, thread_level;
} options_t;

static MPI_Comm comm;             /* our own duplicate: nobody else's messages can meet our wildcard */

static void fail(const char *what)
{
    fprintf(stderr, "reference: %s\n", what);
    MPI_Abort(MPI_COMM_WORLD, 1);
    exit(1);
}

static void *allocate(size_t count, size_t bytes)
{
    void *memory = calloc(count, bytes);
    if (memory == NULL)
        fail("out of memory");
    return memory;
}

/* ---------------------------------------------------------------- waiting ---------------------------------------- */

/* With more ranks than cores this decides everything: whoever spins keeps the one it waits for from running.
 * So poll a few times (the answer may be on its way from another core), then offer the core to the others, and sleep
 * only if nobody had anything for us during many of those offers. */
typedef struct {
    int polls, spin, yield;
    long pause_ns;
} waiter_t;

static inline void waiter_reset(waiter_t *waiter)
{
    waiter->polls = 0;
    waiter->pause_ns = 1000;
}

static inline void waiter_pause(waiter_t *waiter)
{
    if (waiter->polls < waiter->spin) {
        waiter->polls++;
    } else if (waiter->polls < waiter->spin + waiter->yield) {
        waiter->polls++;
        sched_yield();
    } else {
        struct timespec pause = {0, waiter->pause_ns};
        nanosleep(&pause, NULL);
        waiter->pause_ns = 2 * waiter->pause_ns < MAX_PAUSE_NS ? 2 * waiter->pause_ns : MAX_PAUSE_NS;
    }
}

/* A request that needs nothing but our own progress: complete already in nearly all cases. */
static inline void finish(MPI_Request *request)
{
    int done = 0;
    MPI_Test(request, &done, MPI_STATUS_IGNORE);
    if (!done)
        MPI_Wait(request, MPI_STATUS_IGNORE);
}

/* ---------------------------------------------------------------- master ----------------------------------------- */

typedef struct {
    options_t options;
    int slaves, slots;
    size_t job_message, result_message;  /* bytes of a full message, header included */

    /* The job array, one block of it at a time. */
    double *jobs;
    int64_t block_start;

    /* The result array: a ring of `ring_blocks` blocks. A block is checked and used again once it is full, so the
     * memory does not grow with the number of jobs. */
    double *results;
    int *filled;
    int ring_blocks;
    int64_t oldest_block;

    /* Slot s belongs to slave 1 + s % slaves, so that handing out slot after slot goes round the slaves. */
    char *send_buffers;
    MPI_Request *sends;

    char *recv_buffers;
    MPI_Request *recvs;
    int *completed;

    int64_t next, checked, total;
} master_t;

static inline double job_value(int64_t job, int column) { return column == 0 ? (double)job : 0.5; }

static void make_block(master_t *master, int64_t start)
{
    for (int64_t i = 0; i < BLOCK; i++) {
        master->jobs[2 * i] = job_value(start + i, 0);
        master->jobs[2 * i + 1] = job_value(start + i, 1);
    }
    master->block_start = start;
}

static void check_blocks(master_t *master)
{
    for (;;) {
        int64_t start = master->oldest_block * BLOCK;
        int64_t size = master->total - start < BLOCK ? master->total - start : BLOCK;
        int place = (int)(master->oldest_block % master->ring_blocks);
        if (size <= 0 || master->filled[place] < size)
            return;
        const double *results = master->results + (size_t)place * BLOCK;
        for (int64_t i = 0; i < size; i++)
            if (results[i] != job_value(start + i, 0) + job_value(start + i, 1))
                fail("a wrong result");
        master->filled[place] = 0;
        master->oldest_block++;
        master->checked += size;
    }
}

/* Fill a slot with the next jobs and send it. Returns 0 if there is nothing (more) to hand out now. */
static int send_jobs(master_t *master, int slot)
{
    int64_t window_end = (master->oldest_block + master->ring_blocks) * BLOCK;
    int64_t end = master->total < window_end ? master->total : window_end;
    int64_t left = end - master->next;
    int count = left < master->options.grain ? (int)left : master->options.grain;
    if (count <= 0)
        return 0;

    char *buffer = master->send_buffers + (size_t)slot * master->job_message;
    finish(&master->sends[slot]);
    header_t header = {master->next, count, slot};
    memcpy(buffer, &header, sizeof header);
    for (int copied = 0; copied < count;) {
        int64_t offset = master->next - master->block_start;
        if (offset == BLOCK) {
            make_block(master, master->next);
            offset = 0;
        }
        int chunk = BLOCK - offset < count - copied ? (int)(BLOCK - offset) : count - copied;
        memcpy(buffer + sizeof header + (size_t)copied * JOB_BYTES, master->jobs + 2 * offset, (size_t)chunk * JOB_BYTES);
        copied += chunk;
        master->next += chunk;
    }
    MPI_Isend(buffer, (int)(sizeof header + (size_t)count * JOB_BYTES), MPI_BYTE, 1 + slot % master->slaves, JOB_TAG, comm,
              &master->sends[slot]);
    return 1;
}

static void take_results(master_t *master, const header_t *header, const char *payload)
{
    for (int copied = 0; copied < header->count;) {
        int64_t job = header->first + copied;
        int place = (int)(job / BLOCK % master->ring_blocks);
        int offset = (int)(job % BLOCK);
        int chunk = BLOCK - offset < header->count - copied ? BLOCK - offset : header->count - copied;
        memcpy(master->results + (size_t)place * BLOCK + offset, payload + (size_t)copied * RESULT_BYTES,
               (size_t)chunk * RESULT_BYTES);
        master->filled[place] += chunk;
        copied += chunk;
    }
}

static void post_recv(master_t *master, int index)
{
    MPI_Irecv(master->recv_buffers + (size_t)index * master->result_message, (int)master->result_message, MPI_BYTE,
              MPI_ANY_SOURCE, RESULT_TAG, comm, &master->recvs[index]);
}

/* Hand out jobs 0 ... total-1, return when every result is in its place and checked. */
static double farm(master_t *master, int64_t total)
{
    waiter_t waiter = {0, master->options.spin, master->options.yield, 0};
    int *idle = allocate((size_t)master->slots, sizeof *idle);  /* slots held back by a full result window */
    int idle_count = 0;

    waiter_reset(&waiter);
    master->total = total;
    master->next = master->checked = master->oldest_block = 0;
    double start = MPI_Wtime();
    make_block(master, 0);
    for (int slot = 0; slot < master->slots; slot++)
        if (!send_jobs(master, slot))
            idle[idle_count++] = slot;

    while (master->checked < total) {
        int count = 0;
        MPI_Testsome(master->options.recvs, master->recvs, &count, master->completed, MPI_STATUSES_IGNORE);
        if (count == 0) {
            waiter_pause(&waiter);
            continue;
        }
        waiter_reset(&waiter);
        for (int i = 0; i < count; i++) {
            const char *buffer = master->recv_buffers + (size_t)master->completed[i] * master->result_message;
            header_t header;
            memcpy(&header, buffer, sizeof header);
            if (!send_jobs(master, header.slot))  /* first of all, the slave may be waiting */
                idle[idle_count++] = header.slot;
            take_results(master, &header, buffer + sizeof header);
            post_recv(master, master->completed[i]);
        }
        check_blocks(master);
        while (idle_count > 0 && send_jobs(master, idle[idle_count - 1]))
            idle_count--;
    }
    double seconds = MPI_Wtime() - start;
    free(idle);
    return seconds;
}

static void run_master(options_t options, int slaves)
{
    master_t master = {.options = options, .slaves = slaves, .slots = slaves * options.flight};

    size_t recvs = (size_t)master.options.recvs, slots = (size_t)master.slots, grain = (size_t)options.grain;
    master.job_message = sizeof(header_t) + grain * JOB_BYTES;
    master.result_message = sizeof(header_t) + grain * RESULT_BYTES;
    master.ring_blocks = (int)(4 * slots * grain / BLOCK) + 64;
    master.jobs = allocate(BLOCK, JOB_BYTES);
    master.results = allocate((size_t)master.ring_blocks * BLOCK, RESULT_BYTES);
    master.filled = allocate((size_t)master.ring_blocks, sizeof(int));
    master.send_buffers = allocate(slots, master.job_message);
    master.sends = allocate(slots, sizeof(MPI_Request));
    master.recv_buffers = allocate(recvs, master.result_message);
    master.recvs = allocate(recvs, sizeof(MPI_Request));
    master.completed = allocate(recvs, sizeof(int));
    for (size_t slot = 0; slot < slots; slot++)
        master.sends[slot] = MPI_REQUEST_NULL;
    for (size_t index = 0; index < recvs; index++)
        post_recv(&master, (int)index);

    /* Connections are made and pages touched in a first, untimed run; the second one finds the job count. */
    int64_t jobs = options.jobs, trial = 5000 + 20 * (int64_t)(slots * grain);
    double seconds = farm(&master, trial);
    if (jobs == 0) {
        seconds = farm(&master, trial);
        jobs = (int64_t)((double)trial * options.seconds / seconds) + 1;
    }
    seconds = farm(&master, jobs);

    for (int slave = 1; slave <= slaves; slave++)
        MPI_Send(NULL, 0, MPI_BYTE, slave, STOP_TAG, comm);
    for (size_t index = 0; index < recvs; index++) {
        MPI_Cancel(&master.recvs[index]);
        MPI_Wait(&master.recvs[index], MPI_STATUS_IGNORE);
    }
    MPI_Waitall(master.slots, master.sends, MPI_STATUSES_IGNORE);
    printf("{\"rate\": %.1f, \"seconds\": %.4f, \"jobs\": %lld, \"slaves\": %d, \"flight\": %d, \"grain\": %d, "
           "\"recvs\": %d, \"thread_level\": %d}\n", (double)jobs / seconds, seconds, (long long)jobs, slaves,
           options.flight, options.grain, master.options.recvs, options.thread_level);
    free(master.jobs); free(master.results); free(master.filled); free(master.send_buffers); free(master.sends);
    free(master.recv_buffers); free(master.recvs); free(master.completed);
}

/* ---------------------------------------------------------------- slave ------------------------------------------ */

static void run_slave(options_t options)
{
    kernel_function *kernel = add_kernel;
    waiter_t waiter = {0, options.spin, options.yield, 0};
    int ring = options.flight + 1;  /* every message that may be under way, and the stop, finds a receive posted */
    size_t job_message = sizeof(header_t) + (size_t)options.grain * JOB_BYTES;
    size_t result_message = sizeof(header_t) + (size_t)options.grain * RESULT_BYTES;
    char *jobs = allocate((size_t)ring, job_message), *results = allocate((size_t)ring, result_message);
    MPI_Request *recvs = allocate((size_t)ring, sizeof *recvs), *sends = allocate((size_t)ring, sizeof *sends);

    waiter_reset(&waiter);
    for (int i = 0; i < ring; i++) {
        sends[i] = MPI_REQUEST_NULL;
        MPI_Irecv(jobs + (size_t)i * job_message, (int)job_message, MPI_BYTE, 0, MPI_ANY_TAG, comm, &recvs[i]);
    }
    /* One source, one communicator: messages arrive in the order of the receives, so only the next one is polled. */
    for (int next = 0;; next = next + 1 < ring ? next + 1 : 0) {
        MPI_Status status;
        int done = 0;
        for (MPI_Test(&recvs[next], &done, &status); !done; MPI_Test(&recvs[next], &done, &status))
            waiter_pause(&waiter);
        waiter_reset(&waiter);
        if (status.MPI_TAG == STOP_TAG)
            break;
        char *job = jobs + (size_t)next * job_message, *result = results + (size_t)next * result_message;
        header_t header;
        memcpy(&header, job, sizeof header);
        finish(&sends[next]);
        memcpy(result, &header, sizeof header);
        for (size_t i = 0; i < (size_t)header.count; i++)
            if (kernel(job + sizeof header + i * JOB_BYTES, result + sizeof header + i * RESULT_BYTES, NULL) != 0)
                fail("the kernel failed");
        MPI_Isend(result, (int)(sizeof header + (size_t)header.count * RESULT_BYTES), MPI_BYTE, 0, RESULT_TAG, comm,
                  &sends[next]);
        MPI_Irecv(job, (int)job_message, MPI_BYTE, 0, MPI_ANY_TAG, comm, &recvs[next]);
    }
    for (int i = 0; i < ring; i++)
        if (recvs[i] != MPI_REQUEST_NULL) {
            MPI_Cancel(&recvs[i]);
            MPI_Wait(&recvs[i], MPI_STATUS_IGNORE);
        }
    MPI_Waitall(ring, sends, MPI_STATUSES_IGNORE);
    free(jobs); free(results); free(recvs); free(sends);
}

/* ---------------------------------------------------------------- ping-pong -------------------------------------- */

/* bandwidth = 2 * bytes * reps / seconds: the bytes of both directions over the time of the round trips. */
static void pingpong(int rank, size_t bytes, int reps)
{
    unsigned char *buffer = allocate(bytes, 1);
    double start = 0;

    memset(buffer, 1 + rank, bytes);  /* every page is there before the clock starts */
    for (int rep = -3; rep < reps; rep++) {
        if (rep == 0)
            start = MPI_Wtime();
        if (rank == 0) {
            MPI_Send(buffer, (int)bytes, MPI_BYTE, 1, JOB_TAG, comm);
            MPI_Recv(buffer, (int)bytes, MPI_BYTE, 1, RESULT_TAG, comm, MPI_STATUS_IGNORE);
        } else {
            MPI_Recv(buffer, (int)bytes, MPI_BYTE, 0, JOB_TAG, comm, MPI_STATUS_IGNORE);
            MPI_Send(buffer, (int)bytes, MPI_BYTE, 0, RESULT_TAG, comm);
        }
    }
    double seconds = MPI_Wtime() - start;
    for (size_t i = 0; i < bytes; i++)
        if (buffer[i] != 1)
            fail("wrong bytes came back");
    if (rank == 0)
        printf("{\"bytes_per_second\": %.1f, \"bytes\": %zu, \"reps\": %d, \"seconds\": %.4f}\n",
               2.0 * (double)bytes * reps / seconds, bytes, reps, seconds);
    free(buffer);
}

/* ---------------------------------------------------------------- main ------------------------------------------- */

static options_t read_options(int argc, char **argv)
{
    /* Found by trying. Few posted receives are faster than one for every message under way (on MPICH by half with many
     * slaves): Testsome looks at all of them each time, and a small message that finds none costs one more copy. */
    options_t options = {.seconds = 1.0, .flight = 4, .grain = 1, .recvs = 4, .spin = 200, .yield = 2000,
                         .thread_level = MPI_THREAD_MULTIPLE};  /* mpi4py's default */
    for (int i = 2; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(name, "--single") == 0) { options.thread_level = MPI_THREAD_SINGLE; continue; }
        if (strcmp(name, "--jobs") == 0) options.jobs = atoll(value);
        else if (strcmp(name, "--seconds") == 0) options.seconds = atof(value);
        else if (strcmp(name, "--flight") == 0) options.flight = atoi(value);
        else if (strcmp(name, "--grain") == 0) options.grain = atoi(value);
        else if (strcmp(name, "--recvs") == 0) options.recvs = atoi(value);
        else if (strcmp(name, "--spin") == 0) options.spin = atoi(value);
        else if (strcmp(name, "--yield") == 0) options.yield = atoi(value);
        else { fprintf(stderr, "reference: unknown option %s\n", name); exit(2); }
        i++;
    }
    return options;
}

int main(int argc, char **argv)
{
    int is_pingpong = argc == 4 && strcmp(argv[1], "pingpong") == 0;
    int is_farm = argc >= 2 && strcmp(argv[1], "farm") == 0;
    int rank, size, provided;

    if (!is_pingpong && !is_farm) {
        fprintf(stderr, "usage: reference farm [options] | reference pingpong BYTES REPS\n");
        return 2;
    }
    options_t options = read_options(is_farm ? argc : 0, argv);
    MPI_Init_thread(&argc, &argv, options.thread_level, &provided);
    MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &size);
    if (size < 2 || options.flight < 1 || options.grain < 1)
        fail("needs two ranks or more, and at least one job in flight");
    MPI_Barrier(comm);
    if (is_pingpong) {
        if (rank < 2)
            pingpong(rank, (size_t)atoll(argv[2]), atoi(argv[3]));
    } else if (rank == 0) {
        run_master(options, size - 1);
    } else {
        run_slave(options);
    }
    MPI_Barrier(comm);
    MPI_Comm_free(&comm);
    MPI_Finalize();
    return 0;
}
