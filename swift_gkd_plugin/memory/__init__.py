"""What each rank will hold, by part and by phase of a step, told before any weights load."""
