"""The messages of /dev/fuse: numbers, flags and layouts, as the kernel's header has them.

Source: include/uapi/linux/fuse.h, protocol 7.31 and later (kernel 5.4). Little endian, which all
platforms of ours are.
"""

import struct
from enum import IntEnum, IntFlag
from typing import Final


class Opcode(IntEnum):
    """What is asked; others are answered with ENOSYS, and some of them never asked again."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    FSYNCDIR = 30
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46


class Feature(IntFlag):
    """What kernel and server agree on at INIT; the upper 32 bits travel as `flags2`."""

    ASYNC_READ = 1 << 0
    BIG_WRITES = 1 << 5
    DO_READDIRPLUS = 1 << 13
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class Valid(IntFlag):
    """Which fields of SETATTR mean something; FATTR_ in the kernel."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    KILL_SUIDGID = 1 << 11


MAJOR: Final = 7
# The newest minor whose messages are known here; the kernel speaks the lower of the two.
MINOR: Final = 45
OLDEST_MINOR: Final = 31

# struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding.
IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
# struct fuse_out_header: len, error, unique.
OUT_HEADER: Final = struct.Struct("<IiQ")
# struct fuse_init_in up to flags: major, minor, max_readahead, flags; then flags2.
INIT_IN: Final = struct.Struct("<IIII")
INIT_IN_FLAGS2: Final = struct.Struct("<I")
# struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
# max_write, time_gran, max_pages, map_alignment, flags2, max_stack_depth, and 24 reserved bytes.
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHII24x")
# struct fuse_attr: ino, size, blocks, atime, mtime, ctime; their nanoseconds, mode, nlink, uid,
# gid, rdev, blksize, flags. Seconds are signed in the kernel.
ATTR: Final = struct.Struct("<QQQqqqIIIIIIIIII")
# struct fuse_entry_out before its attr: nodeid, generation, entry_valid, attr_valid, and their
# nanoseconds.
ENTRY: Final = struct.Struct("<QQQQII")
# struct fuse_entry_out.
ENTRY_ATTR: Final = struct.Struct(ENTRY.format + ATTR.format[1:])
# struct fuse_attr_out before its attr: attr_valid, its nanoseconds, dummy.
ATTR_OUT: Final = struct.Struct("<QII")
# struct fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding.
READ_IN: Final = struct.Struct("<QQIIQII")
# struct fuse_dirent: ino, off, namelen, type.
DIRENT: Final = struct.Struct("<QQII")
# struct fuse_getxattr_in: size, padding; struct fuse_getxattr_out is the same.
GETXATTR: Final = struct.Struct("<II")
# struct fuse_interrupt_in: unique.
INTERRUPT_IN: Final = struct.Struct("<Q")
# struct fuse_statfs_out: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, and
# 24 reserved bytes.
STATFS_OUT: Final = struct.Struct("<QQQQQIIII24x")

# struct fuse_notify_inval_inode_out: ino, off, len; a len of 0 is all from off on.
INVAL_INODE: Final = struct.Struct("<Qqq")
# struct fuse_notify_inval_entry_out: parent, namelen, flags; then the name and a zero.
INVAL_ENTRY: Final = struct.Struct("<QII")

# enum fuse_notify_code: forget pages and attributes of a node; forget a name.
NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
# Resend what was read and not answered, since 7.40.
NOTIFY_RESEND: Final = 7

# A validity that outlasts every mount, in seconds.
FOREVER: Final = 1 << 31

# What is written, in the layouts of fuse_..._in: before the names that follow, if any do.
# forget: nlookup; batch_forget: count, dummy, and for each node its number and nlookup.
FORGET_IN: Final = struct.Struct("<Q")
BATCH_FORGET_IN: Final = struct.Struct("<II")
FORGET_ONE: Final = struct.Struct("<QQ")
# setattr: valid, padding, fh, size, lock_owner, atime, mtime, ctime, their nanoseconds, mode,
# unused, uid, gid, unused. Seconds are signed in the kernel.
SETATTR_IN: Final = struct.Struct("<IIQQQqqqIIIIIIII")
# mknod: mode, rdev, umask, padding; mkdir: mode, umask.
MKNOD_IN: Final = struct.Struct("<IIII")
MKDIR_IN: Final = struct.Struct("<II")
# rename: newdir; rename2: newdir, flags, padding; link: oldnodeid.
RENAME_IN: Final = struct.Struct("<Q")
RENAME2_IN: Final = struct.Struct("<QII")
LINK_IN: Final = struct.Struct("<Q")
# write: fh, offset, size, write_flags, lock_owner, flags, padding; its answer: size, padding.
WRITE_IN: Final = struct.Struct("<QQIIQII")
WRITE_OUT: Final = struct.Struct("<II")
WRITE_KILL_SUIDGID: Final = 1 << 2
# fsync: fh, fsync_flags, padding.
FSYNC_IN: Final = struct.Struct("<QII")
FSYNC_DATA_ONLY: Final = 1
# setxattr, without FUSE_SETXATTR_EXT: size, flags.
SETXATTR_IN: Final = struct.Struct("<II")
# fallocate: fh, offset, length, mode, padding.
FALLOCATE_IN: Final = struct.Struct("<QQQII")
# lseek: fh, offset, whence, padding; its answer: offset.
LSEEK_IN: Final = struct.Struct("<QQII")
LSEEK_OUT: Final = struct.Struct("<Q")

# FUSE_UNIQUE_RESEND: the request was read before, by a server that was killed.
RESENT: Final = 1 << 63
