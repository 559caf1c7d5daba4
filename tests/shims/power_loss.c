/* Records what one process does to the files below a folder (LD_PRELOAD), for tests/power_loss.py.
   POWER_LOSS_FOLDER is the folder, POWER_LOSS_LOG where the record goes. An event is a line
   "OPERATION INODE NUMBER BYTES BYTES BYTES", followed by as many bytes of two paths and of content.
   Each call and its event are made under one lock, so that the record's order is the true one. Written
   pages of a mapped file are told when it is flushed or no longer mapped; until then nobody rests on them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define MAPPINGS 4096
#define PIECE (1 << 16)

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static int record = -1;
static struct { char *begin; size_t length; off_t offset; int file; } mappings[MAPPINGS];

static void put(const void *bytes, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = REAL(ssize_t, write, int, const void *, size_t);
    for (size_t done = 0; done < count;) {
        ssize_t written = real(record, (const char *)bytes + done, count - done);
        if (written < 0 && errno != EINTR) abort();
        if (written > 0) done += (size_t)written;
    }
}

static const char *folder(void) { return getenv("POWER_LOSS_FOLDER"); }

static int within(const char *path) {
    const char *top = folder();
    size_t length = top == NULL ? 0 : strlen(top);
    return length > 0 && strncmp(path, top, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static void tell(const char *operation, ino_t inode, long long number, const char *one, const char *other,
                 const void *content, size_t count) {
    int failure = errno;
    if (record < 0) {
        int (*real)(const char *, int, ...) = REAL(int, open, const char *, int, ...);
        record = real(getenv("POWER_LOSS_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (record < 0) abort();
    }
    char line[160];
    int length = snprintf(line, sizeof line, "%s %llu %lld %zu %zu %zu\n", operation, (unsigned long long)inode,
                          number, strlen(one), strlen(other), count);
    put(line, (size_t)length);
    put(one, strlen(one));
    put(other, strlen(other));
    if (count > 0) put(content, count);
    errno = failure;
}

/* The path of an open file below the folder, as it is called now; 0 where it is not there. */
static int path_of(int file, char *path) {
    char link[64];
    if (folder() == NULL || file < 0) return 0;
    int failure = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = failure;
    if (length <= 0) return 0;
    path[length] = 0;
    return within(path);
}

/* The whole path of a name in a folder that is open, or in the working folder. */
static int resolved(int at, const char *name, char *path) {
    if (folder() == NULL || name == NULL) return 0;
    if (name[0] == '/') {
        if (strlen(name) >= PATH_MAX) return 0;
        strcpy(path, name);
    } else {
        char above[PATH_MAX];
        if (at == AT_FDCWD) {
            if (getcwd(above, sizeof above) == NULL) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", at);
            ssize_t length = readlink(link, above, sizeof above - 1);
            if (length <= 0) return 0;
            above[length] = 0;
        }
        if (snprintf(path, PATH_MAX, "%s/%s", above, name) >= PATH_MAX) return 0;
    }
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/') path[--length] = 0;
    return within(path);
}

static ino_t inode_of(int file) {
    struct stat found;
    return fstat(file, &found) == 0 ? found.st_ino : 0;
}

static ino_t inode_at(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0 ? found.st_ino : 0;
}

/* Tell a part of a file by reading it, through a descriptor that may read. */
static void tell_part(int file, off_t begin, off_t end) {
    char link[64], piece[PIECE];
    int failure = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int reader = REAL(int, open, const char *, int, ...)(link, O_RDONLY | O_CLOEXEC);
    ssize_t got;
    while (begin < end && (got = pread(reader, piece, (size_t)(end - begin < PIECE ? end - begin : PIECE), begin)) > 0) {
        tell("write", inode_of(file), begin, "", "", piece, (size_t)got);
        begin += got;
    }
    REAL(int, close, int)(reader);
    errno = failure;
}

static void tell_mapped(int number, const char *begin, size_t length) {
    const char *from = mappings[number].begin, *to = from + mappings[number].length;
    const char *first = begin > from ? begin : from, *last = begin + length < to ? begin + length : to;
    if (first >= last) return;
    off_t offset = mappings[number].offset;
    tell_part(mappings[number].file, offset + (first - from), offset + (last - from));
}

#define LOCKED(statements) do { pthread_mutex_lock(&lock); statements; pthread_mutex_unlock(&lock); } while (0)

static int opened(int (*real)(int, const char *, int, mode_t), int at, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    int file, changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (!changes || !resolved(at, name, path)) return real(at, name, flags, mode);
    LOCKED(
        ino_t before = inode_at(path);
        file = real(at, name, flags, mode);
        if (file >= 0 && before == 0) tell("file", inode_of(file), 0, path, "", "", 0);
        if (file >= 0 && before != 0 && (flags & O_TRUNC)) tell("size", inode_of(file), 0, "", "", "", 0));
    return file;
}

static int by_open(int at, const char *name, int flags, mode_t mode) {
    (void)at;
    return REAL(int, open, const char *, int, ...)(name, flags, mode);
}
static int by_openat(int at, const char *name, int flags, mode_t mode) {
    return REAL(int, openat, int, const char *, int, ...)(at, name, flags, mode);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *name, int flags, ...) { MODE(flags) return opened(by_open, AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return opened(by_open, AT_FDCWD, name, flags, mode); }
int openat(int at, const char *name, int flags, ...) { MODE(flags) return opened(by_openat, at, name, flags, mode); }
int openat64(int at, const char *name, int flags, ...) { MODE(flags) return opened(by_openat, at, name, flags, mode); }
int creat(const char *name, mode_t mode) {
    return opened(by_open, AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

static FILE *streamed(FILE *(*real)(const char *, const char *), const char *name, const char *how) {
    char path[PATH_MAX];
    FILE *stream;
    if (how[0] == 'r' || !resolved(AT_FDCWD, name, path)) return real(name, how);
    LOCKED(
        ino_t before = inode_at(path);
        stream = real(name, how);
        if (stream && before == 0) tell("file", inode_of(fileno(stream)), 0, path, "", "", 0);
        if (stream && before != 0 && how[0] == 'w') tell("size", before, 0, "", "", "", 0));
    return stream;
}
FILE *fopen(const char *name, const char *how) {
    return streamed(REAL(FILE *, fopen, const char *, const char *), name, how);
}
FILE *fopen64(const char *name, const char *how) {
    return streamed(REAL(FILE *, fopen64, const char *, const char *), name, how);
}

/* What went through a stream of the C library is told whole when the stream is flushed or closed. */
static int ended(int (*real)(FILE *), FILE *stream) {
    char path[PATH_MAX];
    int file = stream == NULL ? -1 : fileno(stream), result;
    if (!path_of(file, path) || (fcntl(file, F_GETFL) & O_ACCMODE) == O_RDONLY) return real(stream);
    LOCKED(
        REAL(int, fflush, FILE *)(stream);
        struct stat found;
        if (fstat(file, &found) == 0 && S_ISREG(found.st_mode)) tell_part(file, 0, found.st_size);
        result = real(stream));
    return result;
}
int fclose(FILE *stream) { return ended(REAL(int, fclose, FILE *), stream); }
int fflush(FILE *stream) { return ended(REAL(int, fflush, FILE *), stream); }

#define CHANGES(type, name, parameters, arguments, file, event)                          \
    type name parameters {                                                               \
        char path[PATH_MAX];                                                             \
        __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);             \
        if (!path_of(file, path)) return real arguments;                                 \
        type result;                                                                     \
        LOCKED(result = real arguments; event);                                          \
        return result;                                                                   \
    }
#define HERE(file) (lseek(file, 0, SEEK_CUR) - result)
#define GATHERED(file, begin) if (result > 0) tell_part(file, begin, (begin) + result)
#define GIVEN(file, begin) if (result > 0) tell("write", inode_of(file), begin, "", "", bytes, (size_t)result)

CHANGES(ssize_t, write, (int file, const void *bytes, size_t count), (file, bytes, count), file, GIVEN(file, HERE(file)))
CHANGES(ssize_t, pwrite, (int file, const void *bytes, size_t count, off_t at), (file, bytes, count, at), file, GIVEN(file, at))
CHANGES(ssize_t, pwrite64, (int file, const void *bytes, size_t count, off64_t at), (file, bytes, count, at), file, GIVEN(file, at))
CHANGES(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count), file, GATHERED(file, HERE(file)))
CHANGES(ssize_t, pwritev, (int file, const struct iovec *parts, int count, off_t at), (file, parts, count, at), file, GATHERED(file, at))
CHANGES(ssize_t, pwritev64, (int file, const struct iovec *parts, int count, off64_t at), (file, parts, count, at), file, GATHERED(file, at))
CHANGES(ssize_t, sendfile, (int file, int from, off_t *at, size_t count), (file, from, at, count), file, GATHERED(file, HERE(file)))
CHANGES(ssize_t, sendfile64, (int file, int from, off64_t *at, size_t count), (file, from, at, count), file, GATHERED(file, HERE(file)))
CHANGES(ssize_t, copy_file_range, (int from, off64_t *at, int file, off64_t *to, size_t count, unsigned flags),
        (from, at, file, to, count, flags), file, GATHERED(file, to == NULL ? HERE(file) : *to - result))
CHANGES(int, ftruncate, (int file, off_t size), (file, size), file,
        if (result == 0) tell("size", inode_of(file), size, "", "", "", 0))
CHANGES(int, ftruncate64, (int file, off64_t size), (file, size), file,
        if (result == 0) tell("size", inode_of(file), size, "", "", "", 0))
CHANGES(int, posix_fallocate, (int file, off_t at, off_t count), (file, at, count), file,
        if (result == 0) tell("room", inode_of(file), at + count, "", "", "", 0))
CHANGES(int, posix_fallocate64, (int file, off64_t at, off64_t count), (file, at, count), file,
        if (result == 0) tell("room", inode_of(file), at + count, "", "", "", 0))

static void tell_sync(int file, const char *path) {
    ino_t inode = inode_of(file);
    for (int i = 0; i < MAPPINGS; i++)
        if (mappings[i].begin && inode_of(mappings[i].file) == inode)
            tell_mapped(i, mappings[i].begin, mappings[i].length);
    tell("sync", inode, 0, path, "", "", 0);
}
CHANGES(int, fsync, (int file), (file), file, if (result == 0) tell_sync(file, path))
CHANGES(int, fdatasync, (int file), (file), file, if (result == 0) tell_sync(file, path))

static void *mapped(void *(*real)(void *, size_t, int, int, int, off_t), void *wish, size_t length, int access, int flags,
                    int file, off_t offset) {
    char path[PATH_MAX];
    void *begin = real(wish, length, access, flags, file, offset);
    if (begin == MAP_FAILED || !(flags & MAP_SHARED) || !(access & PROT_WRITE) || !path_of(file, path)) return begin;
    LOCKED(
        int i = 0;
        while (i < MAPPINGS && mappings[i].begin) i++;
        if (i == MAPPINGS) abort();
        mappings[i].begin = begin;
        mappings[i].length = length;
        mappings[i].offset = offset;
        mappings[i].file = fcntl(file, F_DUPFD_CLOEXEC, 0));
    return begin;
}
void *mmap(void *wish, size_t length, int access, int flags, int file, off_t offset) {
    return mapped(REAL(void *, mmap, void *, size_t, int, int, int, off_t), wish, length, access, flags, file, offset);
}
void *mmap64(void *wish, size_t length, int access, int flags, int file, off64_t offset) {
    return mapped(REAL(void *, mmap64, void *, size_t, int, int, int, off_t), wish, length, access, flags, file, offset);
}

int msync(void *begin, size_t length, int flags) {
    char path[PATH_MAX];
    int (*real)(void *, size_t, int) = REAL(int, msync, void *, size_t, int), result;
    if (folder() == NULL) return real(begin, length, flags);
    LOCKED(
        result = real(begin, length, flags);
        for (int i = 0; i < MAPPINGS && result == 0; i++) {
            if (!mappings[i].begin || (char *)begin >= mappings[i].begin + mappings[i].length) continue;
            if ((char *)begin + length <= mappings[i].begin) continue;
            tell_mapped(i, begin, length);
            if ((flags & MS_SYNC) && path_of(mappings[i].file, path))
                tell("sync", inode_of(mappings[i].file), 0, path, "", "", 0);
        });
    return result;
}

int munmap(void *begin, size_t length) {
    int (*real)(void *, size_t) = REAL(int, munmap, void *, size_t), result;
    if (folder() == NULL) return real(begin, length);
    LOCKED(
        for (int i = 0; i < MAPPINGS; i++)
            if (mappings[i].begin == begin && begin != NULL) {
                tell_mapped(i, begin, mappings[i].length);
                REAL(int, close, int)(mappings[i].file);
                mappings[i].begin = NULL;
            }
        result = real(begin, length));
    return result;
}

static int named(int result, const char *operation, const char *one, const char *other, const char *content) {
    if (result == 0) tell(operation, inode_at(other[0] ? other : one), 0, one, other, content, strlen(content));
    return result;
}

int mkdirat(int at, const char *name, mode_t mode) {
    char path[PATH_MAX];
    int result, known = resolved(at, name, path);
    LOCKED(
        result = REAL(int, mkdirat, int, const char *, mode_t)(at, name, mode);
        if (known) named(result, "folder", path, "", ""));
    return result;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int at, const char *name, int flags) {
    char path[PATH_MAX];
    int result, known = resolved(at, name, path);
    LOCKED(
        result = REAL(int, unlinkat, int, const char *, int)(at, name, flags);
        if (known) named(result, "remove", path, "", ""));
    return result;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
    int result = unlink(name);
    return result != 0 && (errno == EISDIR || errno == EPERM) ? rmdir(name) : result;
}

int renameat2(int from, const char *one, int to, const char *other, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    int result, known = resolved(from, one, old) | resolved(to, other, new);
    LOCKED(
        result = REAL(int, renameat2, int, const char *, int, const char *, unsigned)(from, one, to, other, flags);
        if (known && flags != 0 && flags != RENAME_NOREPLACE) abort();
        if (known) named(result, "rename", old, new, ""));
    return result;
}
int renameat(int from, const char *one, int to, const char *other) { return renameat2(from, one, to, other, 0); }
int rename(const char *one, const char *other) { return renameat2(AT_FDCWD, one, AT_FDCWD, other, 0); }

int linkat(int from, const char *one, int to, const char *other, int flags) {
    char old[PATH_MAX], new[PATH_MAX];
    int result, known = resolved(from, one, old) & resolved(to, other, new);
    LOCKED(
        result = REAL(int, linkat, int, const char *, int, const char *, int)(from, one, to, other, flags);
        if (known) named(result, "link", old, new, ""));
    return result;
}
int link(const char *one, const char *other) { return linkat(AT_FDCWD, one, AT_FDCWD, other, 0); }

int symlinkat(const char *target, int at, const char *name) {
    char path[PATH_MAX];
    int result, known = resolved(at, name, path);
    LOCKED(
        result = REAL(int, symlinkat, const char *, int, const char *)(target, at, name);
        if (known) named(result, "symlink", path, "", target));
    return result;
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
