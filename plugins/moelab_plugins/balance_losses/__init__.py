"""Balance losses: terms of the training loss that see the routing."""
