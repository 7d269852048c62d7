"""What each verb plans and changes."""
