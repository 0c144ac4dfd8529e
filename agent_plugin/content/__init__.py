"""Which bytes exist, where, and under which digest; knows nothing of sessions, jobs or hooks."""
