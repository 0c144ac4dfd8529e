"""The lazy mount, a process of its own.

It imports `agent_plugin.content` and is imported by nothing.
"""

from agent_plugin.content.own_packages import prefer_own_packages

prefer_own_packages()
