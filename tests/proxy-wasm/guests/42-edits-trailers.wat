(on request_trailers
  (call $num @n@ (local.get $n))
  (call $show @a@ (call $get_header_map_value #1 @x-a@ OUT))
  (call $say @replace@ (call $replace_header_map_value #1 @x-a@ @new@))
  (call $say @remove@ (call $remove_header_map_value #1 @x-b@))
  (call $say @add@ (call $add_header_map_value #1 @x-c@ @3@))
  (call $say @inject@ (call $add_header_map_value #1 @x-d@ @4\0d\0ax-injected: 1@))
  #0)
(on response_trailers
  (call $show @a@ (call $get_header_map_value #3 @x-a@ OUT))
  (call $say @replace@ (call $replace_header_map_value #3 @x-a@ @new@))
  (call $say @remove@ (call $remove_header_map_value #3 @x-b@))
  (call $say @add@ (call $add_header_map_value #3 @x-c@ @3@))
  #0)
