"""Hop 3: where tunnels of tasks end and sessions of users meet them; a runner has one, and a host for agents."""
