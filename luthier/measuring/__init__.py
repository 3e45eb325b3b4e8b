"""What a delta gained, what it cost, and the report that says so. Import the piece you need: audit, checks, report …"""
