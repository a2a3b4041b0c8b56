"""The steps. A new one is made with scripts/new_migration.py; CONTRIBUTING.md says what it may do."""
