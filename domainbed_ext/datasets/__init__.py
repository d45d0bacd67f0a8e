"""The data sets: embedded, fetched and on the disk, all in DomainBed's form."""
