"""The proving ground of locks: processes, faults, and what must be true of the history afterwards."""
