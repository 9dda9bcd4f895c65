/* Makes the disk fail, or kills the process, at a chosen call. Loaded with LD_PRELOAD; inactive until fault_arm is called.
 *
 * Counts the calls of all threads that change something under one folder: open for writing, write, fsync, rename, mkdir, symlink,
 * unlink, rmdir. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[4096];
static long fail_at, count;
static int fault, lasting, log_to = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* `at`: number of the call, from 1, or 0 for none; `error`: an errno, or -1 for SIGKILL; `permanent`: later calls fail, too;
 * `log`: file for the trace of calls. */
void fault_arm(const char *under, long at, int error, int permanent, const char *log) {
    log_to = log && *log ? REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    fail_at = at, fault = error, lasting = permanent, count = 0;
    strncpy(folder, under, sizeof folder - 1);
}

static int fails(const char *call, int at_descriptor, const char *path, const char *other) {
    char place[8192] = "", link[64];
    if (!*folder) return 0;
    if (!path || (*path != '/' && at_descriptor != AT_FDCWD)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at_descriptor);
        ssize_t length = readlink(link, place, 4096);
        if (length < 0) return 0;
        place[length] = 0;
        if (path) strncat(place, "/", 2);
    }
    if (path) strncat(place, path, 4000);
    if (strncmp(place, folder, strlen(folder))) return 0;
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (log_to >= 0) dprintf(log_to, "%s\t%s\t%s\n", call, place, other ? other : "");
    if (!fail_at || now < fail_at || (now > fail_at && !lasting)) return 0;
    if (fault < 0) kill(getpid(), SIGKILL);
    errno = fault;
    return 1;
}

#define WRITES (O_WRONLY | O_RDWR | O_CREAT)
#define MODE va_list rest; va_start(rest, flags); int mode = flags & O_CREAT ? va_arg(rest, int) : 0; va_end(rest)
int open(const char *path, int flags, ...) {
    MODE;
    return flags & WRITES && fails("open", AT_FDCWD, path, 0) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE;
    return flags & WRITES && fails("open", AT_FDCWD, path, 0) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    MODE;
    return flags & WRITES && fails("open", at, path, 0) ? -1 : REAL(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    MODE;
    return flags & WRITES && fails("open", at, path, 0) ? -1 : REAL(openat64)(at, path, flags, mode);
}
ssize_t write(int to, const void *data, size_t length) {
    return to != log_to && fails("write", to, 0, 0) ? -1 : REAL(write)(to, data, length);
}
int fsync(int file) { return fails("fsync", file, 0, 0) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails("fsync", file, 0, 0) ? -1 : REAL(fdatasync)(file); }
int rename(const char *from, const char *to) {
    return fails("rename", AT_FDCWD, from, to) ? -1 : REAL(rename)(from, to);
}
int mkdir(const char *path, mode_t mode) { return fails("mkdir", AT_FDCWD, path, 0) ? -1 : REAL(mkdir)(path, mode); }
int symlink(const char *to, const char *path) {
    return fails("symlink", AT_FDCWD, path, to) ? -1 : REAL(symlink)(to, path);
}
int unlink(const char *path) { return fails("unlink", AT_FDCWD, path, 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) {
    return fails("unlink", at, path, 0) ? -1 : REAL(unlinkat)(at, path, flags);
}
int rmdir(const char *path) { return fails("rmdir", AT_FDCWD, path, 0) ? -1 : REAL(rmdir)(path); }
