"""What the pictures on the front page of the documentation show, measured (`measure`) and drawn (`draw`)."""
