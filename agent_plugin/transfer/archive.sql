-- The archive: transfers that have left the ledger, two weeks after their end, each with its tasks
-- in one compressed document; the tasks of one that was done come a day after its end.
-- The columns are those of the ledger, so that the same questions can be asked of both.

CREATE TABLE IF NOT EXISTS transfer (
  id INTEGER NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, status TEXT NOT NULL,
  priority INTEGER NOT NULL, required INTEGER NOT NULL, source TEXT NOT NULL,
  destination TEXT NOT NULL, session TEXT NOT NULL, job TEXT NOT NULL, step TEXT NOT NULL,
  task TEXT NOT NULL, size INTEGER NOT NULL, done INTEGER NOT NULL, error_code TEXT NOT NULL,
  error TEXT NOT NULL, modifier TEXT NOT NULL, settings TEXT NOT NULL, metadata TEXT NOT NULL,
  lease_owner TEXT NOT NULL, lease_until REAL NOT NULL, created REAL NOT NULL,
  modified REAL NOT NULL, finished REAL,
  archived REAL NOT NULL,       -- when
  PRIMARY KEY (id, created)     -- a ledger that was lost begins to count anew
);
CREATE INDEX IF NOT EXISTS transfer_by_job ON transfer (job);

CREATE TABLE IF NOT EXISTS packed (
  transfer INTEGER NOT NULL,
  created  REAL    NOT NULL,    -- the transfer's
  tasks    BLOB    NOT NULL,    -- zlib of JSON: a list of the ledger's task rows
  events   BLOB    NOT NULL,    -- zlib of JSON: a list of its event rows
  PRIMARY KEY (transfer, created)
);

CREATE TABLE IF NOT EXISTS result (
  id INTEGER NOT NULL, transfer INTEGER NOT NULL, job TEXT NOT NULL, step TEXT NOT NULL,
  task TEXT NOT NULL, spec TEXT NOT NULL, created REAL NOT NULL,
  PRIMARY KEY (id, created)
);
CREATE INDEX IF NOT EXISTS result_by_job ON result (job);

-- Last: until this is committed the file counts as empty.
PRAGMA user_version = 1;
