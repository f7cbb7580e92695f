"""Where bytes live: what is resident, what is available, and the paged pool."""
