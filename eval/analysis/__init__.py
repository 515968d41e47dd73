"""What runs say: tables of gains, costs and settings, with intervals over seeds."""
