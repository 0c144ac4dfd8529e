"""Every movement of bytes: plan, ledger, engine, progress."""
