/* Counts the calls that change files below a folder, and kills the process, or fills the disk, at one of them: see faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
static char root[4096]; static volatile long calls, at; static volatile int mode = -1;
void fault_arm(const char *folder, long n, int what) { strncpy(root, folder, sizeof root - 1); calls = 0; at = n; mode = what; }
long fault_calls(void) { mode = -1; return calls; }
static int below(const char *path) { return mode >= 0 && path && !strncmp(path, root, strlen(root)); }
static int fd_below(int fd) {
  if (mode < 0 || fd < 0) return 0;
  char link[64], path[4096]; snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1); if (n <= 0) return 0;
  path[n] = 0; return below(path);
}
/* 1: this call meets its fate now; 2: the disk is full since an earlier call */
static int due(void) { long n = __sync_add_and_fetch(&calls, 1); return mode == 0 ? 0 : n == at ? 1 : n > at && mode == 2 ? 2 : 0; }
static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }
#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
/* a call that needs no space */
#define FREE(cond) if (cond) { int d = due(); if (d == 1 && mode == 1) die(); }
/* a call that needs space */
#define NEEDS(cond) if (cond) { int d = due(); if (d == 1 && mode == 1) die(); if (d && mode == 2) { errno = ENOSPC; return -1; } }
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPEN(name, decl, path, call_mode) int name decl { REAL(name); mode_t m = 0; if (flags & O_CREAT) { va_list l; va_start(l, flags); m = va_arg(l, int); va_end(l); } \
  if (CHANGES(flags) && below(path)) { if (flags & O_CREAT) { NEEDS(1) } else { FREE(1) } } return call_mode; }
OPEN(open, (const char *path, int flags, ...), path, real(path, flags, m))
OPEN(open64, (const char *path, int flags, ...), path, real(path, flags, m))
OPEN(openat, (int dir, const char *path, int flags, ...), path, real(dir, path, flags, m))
OPEN(openat64, (int dir, const char *path, int flags, ...), path, real(dir, path, flags, m))
#define TORN(half, none) if (fd_below(fd)) { int d = due(); \
  if (d == 1 && size > 1) { half; if (mode == 1) die(); return got > 0 ? got : -1; } if (d == 1 && mode == 1) die(); if (d && mode == 2) { errno = ENOSPC; return -1; } }
ssize_t write(int fd, const void *data, size_t size) { REAL(write); ssize_t got; TORN(got = real(fd, data, size / 2), 0) return real(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t o) { REAL(pwrite); ssize_t got; TORN(got = real(fd, data, size / 2, o), 0) return real(fd, data, size, o); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t o) { REAL(pwrite64); ssize_t got; TORN(got = real(fd, data, size / 2, o), 0) return real(fd, data, size, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); NEEDS(fd_below(fd)) return real(fd, v, n); }
ssize_t sendfile(int out, int in, off_t *o, size_t n) { REAL(sendfile); NEEDS(fd_below(out)) return real(out, in, o, n); }
ssize_t sendfile64(int out, int in, off64_t *o, size_t n) { REAL(sendfile64); NEEDS(fd_below(out)) return real(out, in, o, n); }
ssize_t copy_file_range(int in, off64_t *a, int out, off64_t *b, size_t n, unsigned f) { REAL(copy_file_range); NEEDS(fd_below(out)) return real(in, a, out, b, n, f); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); FREE(fd_below(fd)) return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); FREE(fd_below(fd)) return real(fd, n); }
int posix_fallocate(int fd, off_t a, off_t n) { REAL(posix_fallocate); if (fd_below(fd)) { int d = due(); if (d == 1 && mode == 1) die(); if (d && mode == 2) return ENOSPC; } return real(fd, a, n); }
int fsync(int fd) { REAL(fsync); NEEDS(fd_below(fd)) return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); NEEDS(fd_below(fd)) return real(fd); }
int rename(const char *a, const char *b) { REAL(rename); FREE(below(b)) return real(a, b); }
int renameat(int x, const char *a, int y, const char *b) { REAL(renameat); FREE(below(b)) return real(x, a, y, b); }
int renameat2(int x, const char *a, int y, const char *b, unsigned f) { REAL(renameat2); FREE(below(b)) return real(x, a, y, b, f); }
int unlink(const char *p) { REAL(unlink); FREE(below(p)) return real(p); }
int unlinkat(int d, const char *p, int f) { REAL(unlinkat); FREE(below(p) || fd_below(d)) return real(d, p, f); }
int rmdir(const char *p) { REAL(rmdir); FREE(below(p)) return real(p); }
int mkdir(const char *p, mode_t m) { REAL(mkdir); NEEDS(below(p)) return real(p, m); }
int link(const char *a, const char *b) { REAL(link); NEEDS(below(b)) return real(a, b); }
int linkat(int x, const char *a, int y, const char *b, int f) { REAL(linkat); NEEDS(below(b)) return real(x, a, y, b, f); }
