"""The `propmaster` command: one file per noun, each parses, calls one function and prints."""

from agent_plugin.content.own_packages import prefer_own_packages

prefer_own_packages()
