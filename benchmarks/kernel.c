/* The trivial job of the benchmarks, in the signature that jd_hpc takes for a compiled kernel:
 * 0 for success, anything else for a failed job.
 * It is a file of its own so that reference.c and jd_hpc call the very same code, both of them
 * through a function pointer that no compiler can see through. */
#include <stdint.h>

int32_t add_kernel(const void *job, void *result, void *user_data);

int32_t add_kernel(const void *job, void *result, void *user_data)
{
    const double *values = job;
    (void)user_data;
    *(double *)result = values[0] + values[1];
    return 0;
}
