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
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


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
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


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
