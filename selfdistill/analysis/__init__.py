"""What is looked at after training: attempts token by token, runs beside each other, and pages."""
