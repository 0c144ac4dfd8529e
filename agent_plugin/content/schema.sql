-- The local index: two caches that save reading files and asking the store.
-- Both may be thrown away at any time. A file of another user_version is set aside, never changed.
-- Not STRICT: that needs SQLite 3.37, which older enterprise Linux hosts lack.

CREATE TABLE hash_cache (  -- "this file, unchanged, has this content"
  path       BLOB PRIMARY KEY,   -- absolute, raw OS bytes: names need not be UTF-8
  size       INTEGER NOT NULL,   -- bytes                            ┐
  mtime_ns   INTEGER NOT NULL,   -- nanoseconds since the epoch, UTC │ all five must equal stat()
  ctime_ns   INTEGER NOT NULL,   -- nanoseconds since the epoch, UTC │ now, or the row is ignored
  inode      INTEGER NOT NULL,   -- unsigned 64 bits, kept as signed │
  device     INTEGER NOT NULL,   -- unsigned 64 bits, kept as signed ┘
  hash       BLOB NOT NULL,      -- xxh128 of the content, 16 bytes
  stored_at  INTEGER NOT NULL    -- seconds since the epoch, UTC
) WITHOUT ROWID;

CREATE TABLE existence_cache (  -- "the store had this blob then"
  store_url  TEXT NOT NULL,      -- Store.identity: URL and endpoint
  hash       BLOB NOT NULL,      -- xxh128, 16 bytes
  size       INTEGER NOT NULL,   -- bytes
  last_seen  INTEGER NOT NULL,   -- seconds since the epoch, UTC
  PRIMARY KEY (store_url, hash)
) WITHOUT ROWID;

-- Last: until this is committed the file counts as empty.
PRAGMA user_version = 1;
