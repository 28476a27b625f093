"""Progress of long work: stages, counts and times, reports, and silencing of other libraries."""
