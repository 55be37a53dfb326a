/* A library to preload: the n-th call that creates, writes, syncs or renames a file whose path contains FAULT_PATH fails
 * with an error number, or kills the process.
 *
 *     cc -shared -fPIC -o faults.so faults.c -ldl
 *     LD_PRELOAD=./faults.so FAULT_PATH=.partial FAULT_AT=17 FAULT_ERROR=28 python …    (28: ENOSPC; 0: SIGKILL)
 *
 * fault_at and fault_count are for a process that injects faults into itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static long at = -1;
static int error_number;

void fault_at(long n, int error) { calls = 0; at = n; error_number = error; }
long fault_count(void) { return calls; }

__attribute__((constructor)) static void start(void) {
    if (getenv("FAULT_AT")) fault_at(atol(getenv("FAULT_AT")), atoi(getenv("FAULT_ERROR")));
}

static int fails(const char *path) {
    const char *wanted = getenv("FAULT_PATH");
    if (!path || !wanted || !strstr(path, wanted) || ++calls != at) return 0;
    if (error_number == 0) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

static int fails_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON_FD(type, name, parameters, arguments) \
    type name parameters { return fails_fd(fd) ? -1 : REAL(name) arguments; }
#define ON_OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
        return flags & O_CREAT && fails(path) ? -1 : REAL(name)(path, flags, mode); }
#define ON_OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
        return flags & O_CREAT && fails(path) ? -1 : REAL(name)(folder, path, flags, mode); }

ON_FD(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t offset), (fd, data, size, offset))
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t offset), (fd, data, size, offset))
ON_FD(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_FD(int, ftruncate, (int fd, off_t size), (fd, size))
ON_FD(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_FD(int, fsync, (int fd), (fd))
ON_OPEN(open)
ON_OPEN(open64)
ON_OPENAT(openat)
ON_OPENAT(openat64)
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return fails(from) ? -1 : REAL(rename)(from, to); }
FILE *fopen(const char *path, const char *mode) { return *mode != 'r' && fails(path) ? NULL : REAL(fopen)(path, mode); }
FILE *fopen64(const char *path, const char *mode) { return *mode != 'r' && fails(path) ? NULL : REAL(fopen64)(path, mode); }
