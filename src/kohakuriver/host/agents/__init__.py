"""This host as the node of tasks that dial in to it: agents (docs/protocol.md "Agents")."""
