(on request_headers (call $say @replace@ (call $replace_header_map_value #0 @:path@ @/rewritten?a=b@)) #0)
