/* Makes a file system strange for one process (LD_PRELOAD): STRANGE names what it lacks, of
   links, symlinks, folder_sync, locks, case. Files below STRANGE_FOLDER alone are concerned by case. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE(number) do { errno = (number); return -1; } while (0)

static int lacks(const char *what) {
    const char *stated = getenv("STRANGE");
    return stated != NULL && strstr(stated, what) != NULL;
}

int link(const char *from, const char *to) {
    if (lacks("links")) REFUSE(EPERM);
    return REAL(link)(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
    if (lacks("links")) REFUSE(EPERM);
    return REAL(linkat)(a, from, b, to, flags);
}

int symlink(const char *target, const char *path) {
    if (lacks("symlinks")) REFUSE(EPERM);
    return REAL(symlink)(target, path);
}

int fsync(int file) {
    struct stat found;
    if (lacks("folder_sync") && fstat(file, &found) == 0 && S_ISDIR(found.st_mode)) REFUSE(EINVAL);
    return REAL(fsync)(file);
}

int flock(int file, int operation) {
    if (lacks("locks")) REFUSE(ENOLCK);
    int (*real)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return real(file, operation);
}

static int is_lock(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}

#define FCNTL(name)                                                                   \
    int name(int file, int command, ...) {                                            \
        va_list rest;                                                                 \
        va_start(rest, command);                                                      \
        void *argument = va_arg(rest, void *);                                        \
        va_end(rest);                                                                 \
        if (is_lock(command) && lacks("locks")) REFUSE(ENOLCK);                       \
        int (*real)(int, int, void *) = (int (*)(int, int, void *))dlsym(RTLD_NEXT, #name); \
        return real(file, command, argument);                                         \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

/* The path with small letters alone below the strange folder, as a disk that does not tell case would take it. */
static const char *folded(const char *path, char *space) {
    const char *folder = getenv("STRANGE_FOLDER");
    size_t length = folder == NULL ? 0 : strlen(folder);
    if (length == 0 || !lacks("case") || strncmp(path, folder, length) != 0 || strlen(path) >= PATH_MAX) return path;
    strcpy(space, path);
    for (char *letter = space + length; *letter; letter++) *letter = (char)tolower((unsigned char)*letter);
    return space;
}

#define OPEN(name)                                                                    \
    int name(const char *path, int flags, ...) {                                      \
        char space[PATH_MAX];                                                         \
        va_list rest;                                                                 \
        va_start(rest, flags);                                                        \
        mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0;   \
        va_end(rest);                                                                 \
        int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        return real(folded(path, space), flags, mode);                                \
    }
OPEN(open)
OPEN(open64)

#define STAT(name, kind)                                                              \
    int name(const char *path, struct kind *found) {                                  \
        char space[PATH_MAX];                                                         \
        int (*real)(const char *, struct kind *) = (int (*)(const char *, struct kind *))dlsym(RTLD_NEXT, #name); \
        return real(folded(path, space), found);                                      \
    }
STAT(stat, stat)
STAT(stat64, stat64)

int unlink(const char *path) {
    char space[PATH_MAX];
    return REAL(unlink)(folded(path, space));
}
