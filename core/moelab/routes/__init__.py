"""Who went where: traces of routes on disk, their replay, how far two agree, and what other routes would cost."""
