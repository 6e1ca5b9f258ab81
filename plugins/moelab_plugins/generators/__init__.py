"""Who answers what synthesis asks."""
