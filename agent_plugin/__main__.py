"""`python -m agent_plugin` is `propmaster`."""

from agent_plugin.cli.main import main

if __name__ == "__main__":
    main()
