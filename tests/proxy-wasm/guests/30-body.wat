(on request_headers #0)
(on request_body
  (call $say @write@ (call $add_header_map_value #0 @x-late@ @1@))
  #0)
