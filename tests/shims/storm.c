/* Preloaded into processes of the tests: stops the process before a call of the C library, and shifts its clock.

   Python's hooks see neither TensorStore nor HDF5; this sees all that is linked dynamically. ``sleep_hooks.prepare``
   calls ``storm_stop`` and ``storm_clock`` in a child. The monotonic clock goes on as it is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static char stop_function[32], stop_text[512];
static int stop_number;
static int stop_count;

/* Stop before the n-th call of a function (rename, link, unlink, mkdir, rmdir, fsync, write) whose path has a text. */
void storm_stop(const char *function, const char *text, int number) {
    snprintf(stop_function, sizeof stop_function, "%s", function);
    snprintf(stop_text, sizeof stop_text, "%s", text);
    __atomic_store_n(&stop_count, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&stop_number, number, __ATOMIC_SEQ_CST);
}

/* How many calls there were that count. */
int storm_count(void) { return __atomic_load_n(&stop_count, __ATOMIC_SEQ_CST); }

static void seen(const char *function, const char *path) {
    if (!stop_function[0] || strcmp(function, stop_function) || !path || !strstr(path, stop_text))
        return;
    if (__atomic_add_fetch(&stop_count, 1, __ATOMIC_SEQ_CST) == stop_number)
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGSTOP);
}

static void seen_descriptor(const char *function, int descriptor) {
    char link[64], path[PATH_MAX];
    if (!stop_function[0] || strcmp(function, stop_function))
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return;
    path[length] = 0;
    seen(function, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int rename(const char *from, const char *to) { seen("rename", from); return REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { seen("rename", from); return REAL(renameat)(a, from, b, to); }
int link(const char *from, const char *to) { seen("link", to); return REAL(link)(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
    seen("link", to);
    return REAL(linkat)(a, from, b, to, flags);
}
int unlink(const char *path) { seen("unlink", path); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) { seen("unlink", path); return REAL(unlinkat)(folder, path, flags); }
int mkdir(const char *path, mode_t mode) { seen("mkdir", path); return REAL(mkdir)(path, mode); }
int rmdir(const char *path) { seen("rmdir", path); return REAL(rmdir)(path); }
int fsync(int descriptor) { seen_descriptor("fsync", descriptor); return REAL(fsync)(descriptor); }
ssize_t write(int descriptor, const void *data, size_t size) {
    seen_descriptor("write", descriptor);
    return REAL(write)(descriptor, data, size);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    seen_descriptor("write", descriptor);
    return REAL(pwrite)(descriptor, data, size, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    seen_descriptor("write", descriptor);
    return REAL(pwrite64)(descriptor, data, size, offset);
}

static volatile int64_t *shifted_by;

/* From now on the clock is wrong by the seconds in a file, an int64; whoever changes the file steps the clock. */
int storm_clock(const char *path) {
    int file = open(path, O_RDONLY);
    if (file < 0)
        return -1;
    void *found = mmap(NULL, sizeof *shifted_by, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (found == MAP_FAILED)
        return -1;
    shifted_by = found;
    return 0;
}

static int64_t shift(void) { return shifted_by ? *shifted_by : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += shift();
    return result;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}

int gettimeofday(struct timeval *now, void *zone) {
    int result = REAL(gettimeofday)(now, zone);
    if (!result)
        now->tv_sec += shift();
    return result;
}
