"""Surgery on trained experts: grow, split, merge, prune, revive, another K."""
