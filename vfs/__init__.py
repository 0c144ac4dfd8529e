"""The lazy mount, a process of its own.

It imports `agent_plugin.content` and is imported by nothing.
"""
