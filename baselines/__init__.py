"""The methods that D3PO is compared with, one file each."""
