"""Words of English names and addresses."""
FIRST = frozenset((
    "James Mary Robert Patricia John Jennifer Michael Linda David Elizabeth William Barbara Richard Susan Joseph Jessica Thomas Sarah Christopher Karen Charles Lisa Daniel Nancy Matthew Sandra Anthony Betty "
    "Ashley Donald Emily Steven Kimberly Andrew Margaret Paul Donna Joshua Michelle Kenneth Carol Kevin Amanda Brian Melissa Timothy Deborah Ronald Stephanie Jason Rebecca George Sharon Edward Laura Jeffrey "
    "Cynthia Ryan Dorothy Jacob Amy Nicholas Kathleen Gary Angela Eric Shirley Jonathan Emma Stephen Brenda Larry Pamela Justin Nicole Scott Anna Brandon Samantha Benjamin Katherine Samuel Christine Gregory Helen "
    "Alexander Debra Patrick Rachel Frank Carolyn Raymond Janet Jack Maria Dennis Olivia Jerry Heather Tyler Catherine Aaron Diane Jose Julie Adam Victoria Nathan Joyce Henry Lauren Zachary Kelly Douglas Christina "
    "Peter Ruth Kyle Joan Noah Virginia Ethan Judith Jeremy Evelyn Walter Hannah Christian Andrea Keith Megan Roger Cheryl Terry Jacqueline Sean Madison Gerald Teresa Harold Abigail Carl Sophia Dylan Martha Arthur "
    "Sara Lawrence Gloria Jordan Janice Jesse Kathryn Bryan Ann Billy Isabella Bruce Judy Gabriel Charlotte Joe Julia Logan Grace Alan Amber Juan Alice Albert Jean Willie Denise Elijah Frances Wayne Danielle Randy "
    "Marilyn Vincent Natalie Mason Beverly Roy Diana Ralph Brittany Bobby Theresa Russell Kayla Bradley Alexis Philip Doris Eugene Lori Louis Tiffany Liam Lucas Oliver Leo Oscar Harry Alfie Freddie Theo Archie Isla "
    "Ava Mia Ella Freya Poppy Lily Ivy Daisy Evie Sophie Phoebe Simon Nigel Graham Clive Trevor Gareth Rhys Ian Neil Stuart Craig Colin Derek Gavin Fiona Heidi Claire Gemma Kirsty Hazel Eleanor Lucy Nigel Imogen "
    "Harriet Amelia Edith Florence Rosie Georgia Martin Tony Steve Mike Bob Bill Tom Jim Dave Dan Matt Chris Nick Ben Sam Alex Kate Katie Beth Jenny Sue Liz Maggie Meg Jane Anne Ellen Rose Carlos Luis Miguel Jorge "
    "Pedro Diego Sofia Camila Lucia Elena Ana Carmen Ahmed Mohammed Muhammad Ali Omar Fatima Aisha Priya Raj Arjun Anita Sanjay Wei Ming Li Mei Yuki Hiroshi Kenji Ivan Olga Natasha Sergei Marcus Derrick Tyrone Malik "
    "Jamal Darius Keisha Latoya Ebony Clarence Earl Floyd Hugh Ernest Herbert Howard Leonard Maurice Norman Stanley Theodore Wallace Warren Glenn Stella Irene Lois Norma Phyllis Rita Sylvia Vera Wanda Yvonne Joanne "
    "Erin Holly Paige Chloe Zoe Molly Leah Naomi Miriam Caroline Caleb Isaac Owen Luke Connor Evan Cole Blake Trevor Spencer Garrett Cody Seth Jared Marie Ruby Esther Audrey Sally Geoffrey Rupert Alastair").split())
# Behind (or before) a first name these make a place, a firm, a holiday or a law of it.
NOT_LAST = frozenset((
    "Street Road Avenue Lane Drive Boulevard Court Place Square University College School Hospital Church Hall House Park Bridge Airport Station Island Islands County City Town State Beach Bay River Lake Mountain Valley "
    "Inc Ltd LLC Corp Corporation Company Group Bank Foundation Institute Museum Library Theatre Theater Stadium Center Centre Act Bill Law Day Award Prize Medal Cup Trophy Memorial Monument Committee Commission Council "
    "Department Ministry Office Agency Association Society Press Times Post Journal Magazine News January February March April May June July August September October November December Monday Tuesday Wednesday Thursday Friday "
    "Saturday Sunday The And Of For In On At To Is Was Has Had Will Would Said Says Version Edition Chapter Section Article Amendment Report Project Program Programme System Model Theorem Law Effect Syndrome Disease Test "
    "Method Index Scale Hotel Inn Restaurant Cafe Airlines Motors Foods Pharmaceuticals Partners Holdings Capital Insurance Sports Music Records Films Pictures Studios Hills Heights Gardens Cathedral Abbey Castle Palace").split())
TITLES = r"Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Professor|Sir|Dame|Judge|Justice|Senator|Rev|Reverend|Capt|Captain|Sgt|Sergeant|Lt|Lieutenant|Officer|Detective|Inspector|Nurse|Attorney|Councillor|Councilman|Councilwoman|Congressman|Congresswoman|Col|Colonel|Maj|Major|Gen|Cpl"
LABELS = (r"full name|legal name|first name|last name|surname|name|patient|applicant|claimant|contact(?: person)?|attn|attention|employee|customer|client|student|guardian|parent|witness|defendant|plaintiff|petitioner|respondent|tenant|landlord|"
          r"lessee|lessor|buyer|seller|borrower|guarantor|beneficiary|account holder|card ?holder|holder|signed(?: by)?|signature|signatory|dear|hi|hello|sincerely|regards|best|thanks|yours truly|yours faithfully|cheers|from|to|cc|author|written by|"
          r"prepared by|reviewed by|approved by|submitted by|reported by|manager|supervisor|director|next of kin|emergency contact|spouse|husband|wife|son|daughter|brother|sister|mother|father|driver|passenger|victim|suspect|insured|policy ?holder|"
          r"recipient|sender|ship to|bill to|deliver to|payee|payer|requested by|case worker|caseworker|nominee|executor|trustee|owner|resident|member|user|nurse|doctor|physician|teacher|coach|tutor")
PHRASES = (r"my name is|name is|i am|i'm|this is|named|called|known as|met with|met|spoke (?:to|with)|signed by|written by|c/o|care of|ask for|contact|call|email|reach|notify|thank|thanks to|according to|"
           r"on behalf of|represented by|interviewed|hired|by|with|for|and|from|to|patient|employee|colleague|friend|neighbou?r|tenant|resident|client|customer|applicant|witness|defendant|plaintiff|husband|wife|son|daughter|brother|sister|mother|father")
STREETS = (r"Street|St|Avenue|Ave|Av|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Square|Sq|Terrace|Ter|Close|Crescent|Cres|Circle|Cir|Parkway|Pkwy|Highway|Hwy|Trail|Trl|Alley|Grove|Gardens|Gdns|Mews|Row|Walk|Hill|Plaza|"
           r"Loop|Green|Path|Rise|View|Wharf|Quay|Broadway")
STATES = (r"AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK|OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY|Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|"
          r"Florida|Georgia|Hawaii|Idaho|Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|Mississippi|Missouri|Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|North Carolina|"
          r"North Dakota|Ohio|Oklahoma|Oregon|Pennsylvania|Rhode Island|South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia|Washington|West Virginia|Wisconsin|Wyoming")
