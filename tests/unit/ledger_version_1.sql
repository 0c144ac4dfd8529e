-- The transfer ledger: every movement of bytes on this host, so that it can be looked at, survives
-- kill -9 and is taken up again. Times are seconds since the epoch (UTC), sizes are bytes.
-- Version history: 1 first.

CREATE TABLE IF NOT EXISTS transfer (
  id          INTEGER PRIMARY KEY,
  name        TEXT    NOT NULL,              -- for people: kind and root or task
  kind        TEXT    NOT NULL,              -- sync-in, sync-step, sync-out, submit, outputs
  status      TEXT    NOT NULL,              -- states.TransferStatus
  priority    INTEGER NOT NULL DEFAULT 500,  -- 0 to 1000, higher first
  required    INTEGER NOT NULL DEFAULT 1,    -- 1: its session action waits for it
  source      TEXT    NOT NULL,              -- store URL or directory
  destination TEXT    NOT NULL,              -- directory or store URL
  session     TEXT    NOT NULL DEFAULT '',   -- session id: the key of its state file
  job         TEXT    NOT NULL DEFAULT '',
  step        TEXT    NOT NULL DEFAULT '',
  task        TEXT    NOT NULL DEFAULT '',
  size        INTEGER NOT NULL DEFAULT -1,   -- sum of the tasks that are not excluded; -1 in init
  done        INTEGER NOT NULL DEFAULT 0,    -- of these bytes, how many are in place
  error_code  TEXT    NOT NULL DEFAULT '',   -- errors.PropmasterError.code
  error       TEXT    NOT NULL DEFAULT '',
  lease_owner TEXT    NOT NULL DEFAULT '',   -- pid:start-time of the engine that runs it
  lease_until REAL    NOT NULL DEFAULT 0,    -- past: nobody runs it
  created     REAL    NOT NULL,
  modified    REAL    NOT NULL,
  finished    REAL                           -- NULL while it is live
);
CREATE INDEX IF NOT EXISTS transfer_by_session ON transfer (session, kind);

CREATE TABLE IF NOT EXISTS task (
  id          INTEGER PRIMARY KEY,
  transfer    INTEGER NOT NULL REFERENCES transfer (id) ON DELETE CASCADE,
  status      TEXT    NOT NULL,              -- states.TaskStatus
  priority    INTEGER NOT NULL DEFAULT 500,
  source      TEXT    NOT NULL,              -- sync-in: hash; sync-out: path (BLOB if not UTF-8)
  destination TEXT    NOT NULL,              -- sync-in: path (BLOB if not UTF-8); sync-out: hash
  size        INTEGER NOT NULL,
  tries       INTEGER NOT NULL DEFAULT 0,    -- attempts begun, requests sent again included
  not_before  REAL    NOT NULL DEFAULT 0,    -- when the request that failed last is sent again
  error_code  TEXT    NOT NULL DEFAULT '',
  error       TEXT    NOT NULL DEFAULT '',
  started     REAL,
  finished    REAL
);
CREATE UNIQUE INDEX IF NOT EXISTS task_by_pair ON task (transfer, source, destination);

CREATE TABLE IF NOT EXISTS sample (          -- what moved, for speed and time left
  transfer    INTEGER NOT NULL REFERENCES transfer (id) ON DELETE CASCADE,
  time        REAL    NOT NULL,
  bytes       INTEGER NOT NULL,              -- moved since the sample before
  PRIMARY KEY (transfer, time)
) WITHOUT ROWID;

-- Last: until this is committed the file counts as empty.
PRAGMA user_version = 1;
