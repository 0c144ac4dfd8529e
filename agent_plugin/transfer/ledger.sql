-- The transfer ledger: every movement of bytes on this host, so that it can be looked at, steered
-- and taken up again after kill -9. Times are seconds since the epoch (UTC), sizes are bytes.
-- Version history: 1 first; 2 control by hand, results, events (ledger_migrate.py).

CREATE TABLE IF NOT EXISTS transfer (
  -- AUTOINCREMENT: the number of one that has left for the archive is never another's.
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  name        TEXT    NOT NULL,              -- for people: kind and root or task
  kind        TEXT    NOT NULL,              -- sync-in, sync-step, sync-out, submit, outputs, ...
  status      TEXT    NOT NULL,              -- states.TransferStatus
  priority    INTEGER NOT NULL DEFAULT 500,  -- 0 to 1000, higher first
  required    INTEGER NOT NULL DEFAULT 1,    -- 1: its session action waits for it
  source      TEXT    NOT NULL,              -- store URL or directory
  destination TEXT    NOT NULL,              -- directory or store URL; empty: not known yet
  session     TEXT    NOT NULL DEFAULT '',   -- session id: the key of its state file
  job         TEXT    NOT NULL DEFAULT '',
  step        TEXT    NOT NULL DEFAULT '',
  task        TEXT    NOT NULL DEFAULT '',
  size        INTEGER NOT NULL DEFAULT -1,   -- sum of the tasks that are not excluded; -1 in init
  done        INTEGER NOT NULL DEFAULT 0,    -- of these bytes, how many are in place
  error_code  TEXT    NOT NULL DEFAULT '',   -- errors.PropmasterError.code
  error       TEXT    NOT NULL DEFAULT '',
  modifier    TEXT    NOT NULL DEFAULT '',   -- uid:name of who changed it last by hand
  settings    TEXT    NOT NULL DEFAULT '{}', -- JSON: what its engine is to heed
  metadata    TEXT    NOT NULL DEFAULT '{}', -- JSON: whatever its owner wants to keep with it
  lease_owner TEXT    NOT NULL DEFAULT '',   -- pid:start-time of the engine that runs it
  lease_until REAL    NOT NULL DEFAULT 0,    -- past: nobody runs it
  created     REAL    NOT NULL,
  modified    REAL    NOT NULL,
  finished    REAL                           -- NULL while it is live
);
CREATE INDEX IF NOT EXISTS transfer_by_session ON transfer (session, kind);
CREATE INDEX IF NOT EXISTS transfer_by_status ON transfer (status, priority);

CREATE TABLE IF NOT EXISTS task (
  -- AUTOINCREMENT: tasks that were packed keep their numbers, and may come back.
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  transfer    INTEGER NOT NULL REFERENCES transfer (id) ON DELETE CASCADE,
  uri         TEXT    NOT NULL DEFAULT '',   -- "0", "1", ...: its number within the transfer
  status      TEXT    NOT NULL,              -- states.TaskStatus
  priority    INTEGER NOT NULL DEFAULT 500,
  source      TEXT    NOT NULL,              -- sync-in: hash; sync-out: path (BLOB if not UTF-8)
  destination TEXT    NOT NULL,              -- sync-in: path (BLOB if not UTF-8); sync-out: hash
  size        INTEGER NOT NULL,
  done        INTEGER NOT NULL DEFAULT 0,    -- of these, how many have moved
  tries       INTEGER NOT NULL DEFAULT 0,    -- attempts begun, requests sent again included
  not_before  REAL    NOT NULL DEFAULT 0,    -- when the request that failed last is sent again
  error_code  TEXT    NOT NULL DEFAULT '',
  error       TEXT    NOT NULL DEFAULT '',
  modifier    TEXT    NOT NULL DEFAULT '',   -- uid:name of who set its status by hand; else empty
  metadata    TEXT    NOT NULL DEFAULT '{}', -- JSON
  upload_id   TEXT    NOT NULL DEFAULT '',   -- of an S3 upload in parts that is not complete
  parts       TEXT    NOT NULL DEFAULT '[]', -- JSON: what has been sent of it (s3_upload.SentPart)
  created     REAL    NOT NULL DEFAULT 0,
  started     REAL,
  finished    REAL
);
CREATE UNIQUE INDEX IF NOT EXISTS task_by_pair ON task (transfer, source, destination);
CREATE INDEX IF NOT EXISTS task_by_turn ON task (transfer, priority DESC, id)
  WHERE status = 'queued';
-- With it the failed ones of 100,000 are found at once instead of in 35 ms; a note costs a fifth more.
CREATE INDEX IF NOT EXISTS task_by_status ON task (transfer, status);
CREATE INDEX IF NOT EXISTS task_by_upload ON task (upload_id) WHERE upload_id != '';

CREATE TABLE IF NOT EXISTS sample (          -- what moved, for speed and time left
  transfer    INTEGER NOT NULL REFERENCES transfer (id) ON DELETE CASCADE,
  time        REAL    NOT NULL,
  bytes       INTEGER NOT NULL,              -- moved since the sample before
  PRIMARY KEY (transfer, time)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS result (          -- where a published output is
  id          INTEGER PRIMARY KEY,
  transfer    INTEGER NOT NULL,              -- the transfer that published it
  job         TEXT    NOT NULL,
  step        TEXT    NOT NULL,
  task        TEXT    NOT NULL,
  spec        TEXT    NOT NULL,              -- JSON: docs/PROTOCOL.md, result documents
  created     REAL    NOT NULL
);
CREATE INDEX IF NOT EXISTS result_by_job ON result (job);

CREATE TABLE IF NOT EXISTS event (           -- who changed what; engines read it as news
  id          INTEGER PRIMARY KEY AUTOINCREMENT,
  time        REAL    NOT NULL,
  transfer    INTEGER NOT NULL,
  task        INTEGER,                       -- NULL: the transfer itself
  what        TEXT    NOT NULL,              -- attribute=value
  who         TEXT    NOT NULL               -- uid:name
);
CREATE INDEX IF NOT EXISTS event_by_transfer ON event (transfer, id);

-- Last: until this is committed the file counts as empty.
PRAGMA user_version = 2;
