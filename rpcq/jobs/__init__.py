"""Jobs: how they are sent, run, retried and buried."""
