(on request_headers
  (if (call $path @/local@) (then (drop (call $send_local_response #403 #0 #0 @no@ %x-local=1% #-1))))
  #0)
(on response_headers
  (call $say @write@ (call $add_header_map_value #0 @x-late@ @1@))
  (call $show @read@ (call $get_header_map_value #0 @x-foo@ OUT))
  (call $say @pairs@ (call $get_header_map_pairs #0 OUT))
  (call $num @no pairs@ (i32.eqz (i32.load #4)))
  #0)
(on log
  (call $say @write request@ (call $add_header_map_value #0 @x-late@ @1@))
  (call $say @write response@ (call $add_header_map_value #2 @x-late@ @1@))
  (call $say @remove@ (call $remove_header_map_value #0 @x-foo@))
  (call $show @x-foo@ (call $get_header_map_value #0 @x-foo@ OUT))
  (call $show @:path@ (call $get_header_map_value #0 @:path@ OUT))
  (call $show @:status@ (call $get_header_map_value #2 @:status@ OUT))
  (call $show @x-up@ (call $get_header_map_value #2 @x-up@ OUT))
  (call $show @x-local@ (call $get_header_map_value #2 @x-local@ OUT)))
