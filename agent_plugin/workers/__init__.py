"""What worker agents start: drop-ins for theirs, and the host service that runs them for others."""

from agent_plugin.content.own_packages import prefer_own_packages

prefer_own_packages()
