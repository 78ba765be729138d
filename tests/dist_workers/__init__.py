"""What tests run in several processes: functions (world, *args) → JSON, called by tests/processes.py."""
