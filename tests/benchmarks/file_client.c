/* One timed operation on files, for the mount benchmark; prints seconds, and what was moved.
 *
 *   file_client [-d] [-w] [-t MIB] [-n TIMES] OPERATION ARGUMENT...
 *
 *   -d   drop the page cache, names and inodes of the whole host first (root), but what is dirty
 *   -w   do it all once before it is timed
 *   -t   first touch so much memory and give it back, so that a virtual machine has it
 *   -n   do it so often within the timed part
 *
 *   read PATH...            whole files by read(2) of 1 MiB, each in a thread of its own
 *   map PATH                a whole file through mmap(2), copied in pieces of 1 MiB
 *   random PATH COUNT       pread(2) of 4 KiB at so many random places, the same each time
 *   open ROOT LIST          open, read to the end and close every file that LIST names
 *   list ROOT               names and attributes of all below a directory
 *   first ROOT LIST         as open, but only the first 4 KiB of each
 *   write PATH BYTES        a new file by write(2) of 1 MiB
 *   create ROOT COUNT BYTES so many new files of so many bytes, 100 to a directory
 *
 * In C, since an interpreter's microseconds for each call would be on both sides of every ratio and
 * draw it towards 1. It does what is timed and nothing else.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 20, PAGE = 4096, IN_DIRECTORY = 100 };

static char *piece;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static void *allocate(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) err(1, "memory");
    memset(memory, 1, bytes);
    return memory;
}

static int open_file(int directory, const char *path, int flags) {
    int fd = openat(directory, path, flags, 0644);
    if (fd < 0) err(1, "%s", path);
    return fd;
}

static long read_to_end(int fd, char *buffer, const char *path) {
    long total = 0;
    ssize_t got;
    while ((got = read(fd, buffer, PIECE)) > 0) total += got;
    if (got < 0) err(1, "%s", path);
    return total;
}

struct reader {
    pthread_t thread;
    const char *path;
    char *buffer;
    long bytes;
};

static void *read_one(void *argument) {
    struct reader *reader = argument;
    int fd = open_file(AT_FDCWD, reader->path, O_RDONLY);
    reader->bytes = read_to_end(fd, reader->buffer, reader->path);
    close(fd);
    return NULL;
}

static long do_read(char **paths) {
    static struct reader readers[64];
    long total = 0;
    int count = 0;
    for (; paths[count] && count < 64; count++) {
        if (!readers[count].buffer) readers[count].buffer = allocate(PIECE);
        readers[count].path = paths[count];
    }
    if (count == 1) {
        read_one(&readers[0]);
        return readers[0].bytes;
    }
    for (int at = 0; at < count; at++)
        if (pthread_create(&readers[at].thread, NULL, read_one, &readers[at])) errx(1, "thread");
    for (int at = 0; at < count; at++) {
        pthread_join(readers[at].thread, NULL);
        total += readers[at].bytes;
    }
    return total;
}

static long do_map(char **arguments) {
    int fd = open_file(AT_FDCWD, arguments[0], O_RDONLY);
    struct stat status;
    if (fstat(fd, &status)) err(1, "%s", arguments[0]);
    char *mapped = mmap(NULL, status.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) err(1, "%s", arguments[0]);
    for (off_t at = 0; at < status.st_size; at += PIECE) {
        size_t left = status.st_size - at;
        memcpy(piece, mapped + at, left < PIECE ? left : PIECE);
    }
    munmap(mapped, status.st_size);
    close(fd);
    return status.st_size;
}

static long do_random(char **arguments) {
    int fd = open_file(AT_FDCWD, arguments[0], O_RDONLY);
    long count = atol(arguments[1]);
    struct stat status;
    if (fstat(fd, &status)) err(1, "%s", arguments[0]);
    uint64_t state = 88172645463325252ULL, pages = status.st_size / PAGE;
    for (long at = 0; at < count; at++) {
        /* xorshift64: George Marsaglia, "Xorshift RNGs", 2003. */
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        if (pread(fd, piece, PAGE, state % pages * PAGE) != PAGE) err(1, "%s", arguments[0]);
    }
    close(fd);
    return count;
}

/* The list, split once: names that end with newlines. */
static char **names_in(const char *path) {
    static char **names;
    if (names) return names;
    int fd = open_file(AT_FDCWD, path, O_RDONLY);
    struct stat status;
    if (fstat(fd, &status)) err(1, "%s", path);
    char *text = allocate(status.st_size + 1);
    if (read(fd, text, status.st_size) != status.st_size) err(1, "%s", path);
    close(fd);
    text[status.st_size] = 0;
    long count = 0;
    for (char *at = text; *at; at++) count += *at == '\n';
    names = allocate((count + 1) * sizeof *names);
    count = 0;
    for (char *save, *name = strtok_r(text, "\n", &save); name; name = strtok_r(NULL, "\n", &save))
        names[count++] = name;
    names[count] = NULL;
    return names;
}

static long each_file(char **arguments, int whole) {
    char **names = names_in(arguments[1]);
    int root = open_file(AT_FDCWD, arguments[0], O_RDONLY | O_DIRECTORY);
    long total = 0;
    for (; *names; names++) {
        int fd = open_file(root, *names, O_RDONLY);
        if (whole) {
            total += read_to_end(fd, piece, *names);
        } else {
            ssize_t got = read(fd, piece, PAGE);
            if (got < 0) err(1, "%s", *names);
            total += got;
        }
        close(fd);
    }
    close(root);
    return total;
}

static long do_open(char **arguments) { return each_file(arguments, 1); }
static long do_first(char **arguments) { return each_file(arguments, 0); }

static long list_below(int above, const char *name) {
    int fd = open_file(above, name, O_RDONLY | O_DIRECTORY);
    DIR *directory = fdopendir(fd);
    if (!directory) err(1, "%s", name);
    long count = 0;
    struct dirent *entry;
    while (errno = 0, (entry = readdir(directory))) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        struct stat status;
        if (fstatat(fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW)) err(1, "%s", entry->d_name);
        count += S_ISDIR(status.st_mode) ? list_below(fd, entry->d_name) : 1;
    }
    if (errno) err(1, "%s", name);
    closedir(directory);
    return count;
}

static long do_list(char **arguments) { return list_below(AT_FDCWD, arguments[0]); }

static void write_all(int fd, long bytes, const char *path) {
    while (bytes > 0) {
        ssize_t written = write(fd, piece, bytes < PIECE ? bytes : PIECE);
        if (written < 0) err(1, "%s", path);
        bytes -= written;
    }
}

static long do_write(char **arguments) {
    int fd = open_file(AT_FDCWD, arguments[0], O_WRONLY | O_CREAT | O_TRUNC);
    write_all(fd, atol(arguments[1]), arguments[0]);
    if (close(fd)) err(1, "%s", arguments[0]);
    return atol(arguments[1]);
}

static long do_create(char **arguments) {
    int root = open_file(AT_FDCWD, arguments[0], O_RDONLY | O_DIRECTORY);
    long count = atol(arguments[1]), bytes = atol(arguments[2]);
    char name[64];
    for (long at = 0; at < count; at++) {
        snprintf(name, sizeof name, "%04ld", at / IN_DIRECTORY);
        if (at % IN_DIRECTORY == 0 && mkdirat(root, name, 0755)) err(1, "%s", name);
        snprintf(name, sizeof name, "%04ld/%06ld.bin", at / IN_DIRECTORY, at);
        int fd = open_file(root, name, O_WRONLY | O_CREAT | O_EXCL);
        write_all(fd, bytes, name);
        if (close(fd)) err(1, "%s", name);
    }
    close(root);
    return count;
}

static void drop_caches(void) {
    int fd = open_file(AT_FDCWD, "/proc/sys/vm/drop_caches", O_WRONLY);
    if (write(fd, "3", 1) != 1) err(1, "drop_caches");
    close(fd);
}

static const struct {
    const char *name;
    int arguments;
    long (*run)(char **);
} OPERATIONS[] = {
    {"read", 1, do_read},   {"map", 1, do_map},     {"random", 2, do_random},
    {"open", 2, do_open},   {"list", 1, do_list},   {"first", 2, do_first},
    {"write", 2, do_write}, {"create", 3, do_create},
};

int main(int count, char **arguments) {
    int option, drop = 0, warm = 0, times = 1;
    long touch = 0;
    while ((option = getopt(count, arguments, "+dwt:n:")) != -1) {
        if (option == 'd') drop = 1;
        else if (option == 'w') warm = 1;
        else if (option == 't') touch = atol(optarg);
        else if (option == 'n') times = atoi(optarg);
        else return 2;
    }
    arguments += optind;
    count -= optind;
    for (size_t at = 0; at < sizeof OPERATIONS / sizeof *OPERATIONS; at++) {
        if (!count || strcmp(arguments[0], OPERATIONS[at].name)) continue;
        if (count <= OPERATIONS[at].arguments) errx(2, "%s: too few arguments", arguments[0]);
        piece = allocate(PIECE);
        /* First, since what is touched and given back last is what the kernel takes next. */
        if (drop) drop_caches();
        if (touch) munmap(allocate(touch << 20), touch << 20);
        long moved = 0;
        if (warm) OPERATIONS[at].run(arguments + 1);
        double begun = now();
        for (int time = 0; time < times; time++) moved = OPERATIONS[at].run(arguments + 1);
        printf("%.9f %ld\n", now() - begun, moved);
        return 0;
    }
    errx(2, "no such operation");
}
